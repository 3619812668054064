"""``tenuto-train import-popgym``: publishes the policy of an old RLlib checkpoint of POPGym's DiffNC or Frameconv.

Reads only the command line here; :mod:`tenuto_trainer.importing.old_policy` does the work.
Exit codes: 0 published, 1 the checkpoint cannot be imported, 2 the command line, folder or environment is unusable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tenuto_trainer.errors import ImportedError, TrainConfigError, TrainerError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line. Exits with code 2 and one line where it cannot be understood."""
    parser = argparse.ArgumentParser(
        prog="tenuto-train import-popgym",
        description="Publish the policy of an RLlib checkpoint of POPGym's DiffNC or Frameconv. Runs none of it.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder or file that RLlib's old stack wrote")
    parser.add_argument("--env", dest="env_id", required=True, help="environment that the policy was trained on")
    parser.add_argument("--repository", type=Path, required=True, help="folder to publish the version to")
    parser.add_argument("--policy", help="name in the repository; default: the environment's id")
    parser.add_argument("--read-heads", type=int, help="DiffNC: read heads, where the tensors leave it open")
    parser.add_argument("--cell-size", type=int, help="DiffNC: floats per cell, where the tensors leave it open")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Import one checkpoint and return the exit code."""
    arguments = parse(argv)
    # Torch takes seconds to import, and the base install does not have it.
    try:
        from tenuto_envs import EnvError
        from tenuto_models import CheckpointError, ConfigError
        from tenuto_trainer.importing.old_policy import published
    except ModuleNotFoundError as error:
        advice = "pip install 'tenuto[trainer]', or pip install '.[trainer]' in a clone"
        return _fail(f"the package {error.name!r} is not installed; {advice}", TrainerError.exit_code)
    given = {"read_heads": arguments.read_heads, "cell_size": arguments.cell_size}
    try:
        folder, notes = published(
            arguments.checkpoint, arguments.env_id, arguments.repository, arguments.policy or "", given
        )
    except EnvError as error:
        return _fail(error, TrainConfigError.exit_code)
    except TrainerError as error:
        return _fail(error, error.exit_code)
    except (CheckpointError, ConfigError, OSError) as error:
        return _fail(error, ImportedError.exit_code)
    for note in notes:
        sys.stderr.write(f"tenuto-train: note: {note}\n")
    sys.stdout.write(f"published {folder}\nserve it:  tenuto-serve --repository {arguments.repository}\n")
    return 0


def _fail(error: Exception | str, code: int) -> int:
    sys.stderr.write(f"tenuto-train: {error}\n")
    return code
