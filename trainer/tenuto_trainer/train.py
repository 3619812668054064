"""``tenuto-train``: reads the command line, runs one training, and turns errors into one line and an exit code.

Exit codes: 0 the run ended as asked or by a signal, 1 it failed or a package is missing, 2 the command line, a folder
or the environment cannot be used. Nothing is written but the repository, the log folder and, while the run lasts, a
folder below TMPDIR; there torch also makes its cache folder, torchinductor_<user>, which stays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from tenuto_trainer.config import MEMORIES, TrainConfig
from tenuto_trainer.errors import TrainConfigError, TrainerError
from tenuto_trainer.folders import require_writable

_HELP: dict[str, tuple[type, str]] = {
    "policy": (str, "name in the repository; default: the environment's id"),
    "iterations": (int, "stop after this many iterations; default: no limit"),
    "stop_return": (float, "stop at this mean episode return; default: no limit"),
    "stop_seconds": (float, "stop after this many seconds of training; default: no limit"),
    "publish_every": (int, "iterations between two publications"),
    "publish_gain": (float, "rise over the best published return that is published at once"),
    "log_dir": (Path, "folder for TensorBoard logs"),
    "evaluation_episodes": (int, "greedy episodes on held-out seeds before a publication; 0: none"),
    "evaluation_max_steps": (int, "steps after which an evaluated episode is cut"),
    "learner_device": (str, "cpu, cuda or auto"),
    "seed": (int, "seed of weights, actions and environments; default: drawn anew"),
    "num_envs": (int, "environments stepped together"),
    "num_env_runners": (int, "further processes that step environments"),
    "batch_size": (int, "environment steps per iteration"),
    "minibatch_size": (int, "environment steps per gradient step"),
    "num_epochs": (int, "passes over the batch per iteration"),
    "max_seq_len": (int, "steps that gradients reach back"),
    "lr": (float, "learning rate"),
    "gamma": (float, "discount per step"),
    "gae_lambda": (float, "weight of longer returns in the advantage estimate"),
    "clip": (float, "PPO's clip range"),
    "entropy": (float, "weight of the entropy bonus"),
    "grad_clip": (float, "largest gradient norm"),
    "torch_threads": (int, "threads of torch"),
    "hidden_size": (int, "width of feature map, core and heads"),
    "num_cells": (int, "DNC: cells"),
    "cell_size": (int, "DNC: floats per cell"),
    "num_read_heads": (int, "DNC: read heads"),
    "stack_size": (int, "Frameconv: frames seen"),
}


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """Read the command line. Exits with code 2 and one line where it cannot be understood."""
    parser = argparse.ArgumentParser(
        prog="tenuto-train", description="Train a policy with memory and publish its versions to a repository."
    )
    parser.add_argument("--env", dest="env_id", required=True, help="popgym-…-v0, a gymnasium id, or module:callable")
    parser.add_argument("--memory", required=True, choices=MEMORIES, help="memory core")
    parser.add_argument("--repository", type=Path, required=True, help="folder to publish versions to")
    defaults = {f.name: f.default for f in fields(TrainConfig) if f.default is not MISSING}
    for name, (kind, text) in _HELP.items():
        default = defaults[name]
        shown = "" if "default:" in text else f"; default: {default}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text + shown)
    try:
        return TrainConfig(**vars(parser.parse_args(argv)))
    except TrainConfigError as error:
        sys.stderr.write(f"tenuto-train: {error}\n")
        sys.exit(TrainConfigError.exit_code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tenuto-train`` and return its exit code."""
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
        advice = "pip install 'tenuto[trainer]', or pip install '.[trainer]' in a clone"
        return _fail(f"the package {error.name!r} is not installed; {advice}", TrainerError.exit_code)

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
