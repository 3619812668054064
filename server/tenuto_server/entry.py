"""The console script ``tenuto-serve``: says which extra is missing instead of failing to import."""

import sys


def main() -> None:
    """Run the server of this installation."""
    try:
        from tenuto_server.main import main as serve
    except ModuleNotFoundError as error:
        advice = "pip install 'tenuto[server]', or pip install '.[server]' in a clone"
        sys.exit(f"tenuto-serve: the package {error.name!r} is not installed; {advice}")
    serve()
