"""``tenuto-train``: reads the command line and its file of settings, runs one training, turns errors into exit codes.

Exit codes: 0 the run ended as asked or by a signal, 1 it failed, a package is missing or the server refuses the newest
version, 2 the command line, a folder or the environment cannot be used. Nothing is written but the repository, the log
folder and, while the run lasts, a folder below TMPDIR; there torch also makes its cache folder, torchinductor_<user>,
which stays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tenuto_trainer.config import TrainConfig
from tenuto_trainer.errors import TrainConfigError, TrainerError
from tenuto_trainer.folders import require_writable
from tenuto_trainer.importing import command as import_popgym
from tenuto_trainer.settings import settings

_METAVARS = {int: "N", float: "X", str: "NAME", Path: "FOLDER"}


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """Read the command line and the file that it may name. Exits with code 2 and a line if they are not understood."""
    parser = argparse.ArgumentParser(
        prog="tenuto-train",
        allow_abbrev=False,
        usage="tenuto-train --env ID --memory {dnc,frameconv} --repository FOLDER [--config FILE] [setting …]",
        description="Train a policy with memory and publish its versions to a repository.",
        epilog="tenuto-train import-popgym --help: publish the policy of an old RLlib checkpoint of a POPGym model.",
        argument_default=argparse.SUPPRESS,  # What is not given stays that of the file, or the default.
    )
    parser.add_argument("--version", action="version", version=f"tenuto {version('tenuto')}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings; flags go before it")
    for setting in settings():
        unset = setting.default is None or setting.default is MISSING or setting.default == ""
        text = setting.help + ("" if unset else f" Default: {setting.default}.")
        parser.add_argument(
            setting.flag, dest=setting.name, type=setting.kind, metavar=_METAVARS[setting.kind],
            help=text.replace("%", "%%").replace("``", ""),
        )  # fmt: skip
    given = vars(parser.parse_args(argv))
    try:
        file = given.pop("config", None)
        chosen = (_read_file(file) if file else {}) | given
        missing = [s.flag for s in settings() if s.default is MISSING and s.name not in chosen]
        if missing:
            parser.error(f"the following settings are required: {', '.join(missing)}")
        return TrainConfig(**chosen)
    except TrainerError as error:
        sys.stderr.write(f"tenuto-train: {error}\n")
        sys.exit(error.exit_code)


def _read_file(path: Path) -> dict[str, Any]:
    try:  # The base install cannot read TOML.
        from tenuto_trainer import config_file
    except ModuleNotFoundError as error:
        raise TrainerError(_missing(error)) from error
    return config_file.read(path)


def _missing(error: ModuleNotFoundError) -> str:
    advice = "pip install 'tenuto[trainer]', or pip install '.[trainer]' in a clone"
    return f"the package {error.name!r} is not installed; {advice}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tenuto-train``, or ``tenuto-train import-popgym``, and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["import-popgym"]:
        return import_popgym.main(argv[1:])
    config = parse(argv)
    try:
        require_writable(config)
    except TrainConfigError as error:
        return _fail(error, error.exit_code)
    # Torch and Ray take seconds to import, and the base install has neither.
    try:
        from rich.console import Console

        from tenuto_envs import EnvError
        from tenuto_models import CheckpointError, ConfigError
        from tenuto_trainer.loop import train
        from tenuto_trainer.progress import Progress
    except ModuleNotFoundError as error:
        return _fail(_missing(error), TrainerError.exit_code)

    try:
        with Progress(Console(), config.log_dir / config.policy) as progress:
            train(config, progress)
    except (EnvError, ConfigError) as error:
        return _fail(error, TrainConfigError.exit_code)
    except TrainerError as error:
        return _fail(error, error.exit_code)
    except (CheckpointError, OSError) as error:
        return _fail(error, TrainerError.exit_code)
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(error: Exception | str, code: int) -> int:
    sys.stderr.write(f"tenuto-train: {error}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
