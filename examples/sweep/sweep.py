"""A sweep by Ray Tune over learning rate, memory and width: trains every trial, prints them, publishes the best.

A trial is what ``tenuto-train`` does, with the project's own configuration, learner and publisher; Tune decides which
trials there are and runs as many at once as there are CPUs. It leaves nothing but the best trial's policy.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tenuto_envs import EnvError, make
from tenuto_trainer import TrainConfig, TrainConfigError, TrainerError
from tenuto_trainer.train import parse

SETTINGS = Path(__file__).with_name("sweep.toml")
SMOKE = ["--iterations", "1", "--batch-size", "128", "--minibatch-size", "64", "--num-envs", "4", "--num-epochs", "1"]
SMOKE += ["--evaluation-episodes", "4"]
LEARNING_RATES, WIDTHS = (3e-4, 3e-3), [32, 64, 128]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; the exit code is 0 if a policy was published."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="All other flags go to tenuto-train for every trial.")
    parser.add_argument("--samples", type=int, default=4, help="trials (4)")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="trials at once, a CPU each (all)")
    parser.add_argument("--smoke", action="store_true", help="two tiny trials, to see that everything works")
    arguments, others = parser.parse_known_args(argv)
    if swept := {flag.partition("=")[0] for flag in others} & {"--lr", "--memory", "--hidden-size"}:
        parser.error(f"{', '.join(sorted(swept))}: drawn for every trial, and cannot be set for all")
    base = parse(["--config", str(SETTINGS), *(SMOKE if arguments.smoke else []), *others])
    num_samples = 2 if arguments.smoke else arguments.samples
    # Ray is told before it is imported; its workers run in folders of their own.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    base = replace(base, repository=base.repository.absolute(), log_dir=base.log_dir.absolute())
    console = Console()
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        try:
            require_comparable(base)
            trials = sweep(base, num_samples, arguments.parallel, Path(folder), console)
        except (TrainerError, EnvError) as error:
            return _fail(str(error))
        if not trials:
            return _fail("no trial was finished")
        console.print(table(trials))
        published = publish(base, trials[0])
    console.print(f"published the best trial: {published}", soft_wrap=True, highlight=False)
    console.print(f"serve it: tenuto-serve --repository {base.repository}", soft_wrap=True, highlight=False)
    return 0


def sweep(base: TrainConfig, num_samples: int, parallel: int, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Train the trials and return what the finished ones report, the best first."""
    import numpy as np
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from tenuto_trainer.ppo import local_ray

    class Line(tune.Callback):
        """Says when a trial has ended. Tune pickles it, so it owns nothing."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            print(f"{_title(trial.config)}: return {_said(trial.last_result)}", flush=True)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            print(f"{_title(trial.config)}: failed", flush=True)

    space = {
        "memory": tune.choice(["dnc", "frameconv"]),
        "lr": tune.loguniform(*LEARNING_RATES),
        "hidden_size": tune.choice(WIDTHS),
    }
    with local_ray(base, num_cpus=parallel):
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # Failed trials are named below, in a line each.
        tuner = tune.Tuner(
            tune.with_parameters(train_trial, base=base, folder=folder),
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=num_samples,
                search_alg=BasicVariantGenerator(random_state=np.random.RandomState(base.seed)),
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(folder), verbose=0, log_to_file=False, callbacks=[Line()]
            ),
        )
        results = tuner.fit()
    for reason in {str(error).strip().splitlines()[-1] for error in results.errors}:
        console.print(f"failed: {reason}", highlight=False, markup=False, soft_wrap=True)
    finished = [dict(result.metrics) for result in results if result.error is None and result.metrics]
    return sorted(finished, key=lambda metrics: metrics["return"], reverse=True)


def train_trial(params: dict[str, Any], base: TrainConfig, folder: Path) -> None:
    """Train one policy in a process of Tune's, and report its newest version."""
    import torch
    from ray import tune

    from tenuto_trainer.ppo import build_algorithm, ppo_config
    from tenuto_trainer.resume import Start

    name = tune.get_context().get_trial_id()
    config = replace(base, **params, repository=folder / "trials", policy=name)
    torch.set_num_threads(config.torch_threads)
    env = make(config.env_id)
    with build_algorithm(ppo_config(config, env.observation_space, env.action_space, Start())) as (
        algorithm,
        publisher,
    ):
        while not _is_done(config, publisher.progress):
            algorithm.train()
        publisher.publish(algorithm)
        now, seen = publisher.progress, publisher.evaluation
        assert seen is not None, "require_comparable has seen to that"
        tune.report(
            {
                "folder": str(config.repository / name / str(publisher.version)),
                "return": seen.return_mean,
                "spread": seen.return_std,
                "env_steps": now.env_steps,
                "seconds": now.seconds,
            }
        )


def require_comparable(base: TrainConfig) -> None:
    """Raise TrainConfigError or EnvError for what no trial could run with, end with, or be compared by."""
    make(base.env_id).close()
    if base.iterations is None and base.stop_seconds is None:
        raise TrainConfigError("iterations: got none, expected a number of them or --stop-seconds, to end each trial")
    if base.evaluation_episodes == 0:
        raise TrainConfigError("evaluation_episodes: got 0, expected at least 1, since trials are compared by them")


def _is_done(config: TrainConfig, now: Any) -> bool:
    by_iterations = config.iterations is not None and now.iteration >= config.iterations
    return by_iterations or (config.stop_seconds is not None and now.seconds >= config.stop_seconds)


def table(trials: list[dict[str, Any]]) -> Table:
    """Show the trials, the best first."""
    shown = Table("return", "memory", "lr", "hidden size", "env steps", "seconds")
    for trial in trials:
        params = trial["config"]
        shown.add_row(
            _said(trial), params["memory"], f"{params['lr']:.2g}", str(params["hidden_size"]),
            f"{trial['env_steps']:,}", f"{trial['seconds']:.0f}",
        )  # fmt: skip
    return shown


def publish(base: TrainConfig, best: dict[str, Any]) -> Path:
    """Copy a trial's policy to the repository, as the next version of the policy of its kind."""
    from tenuto_models import checkpoint

    found, params = checkpoint.read(Path(best["folder"])), best["config"]
    # Versions of one policy keep the same state, so memories and widths are policies of their own.
    name = f"{base.policy}-{params['memory']}-{params['hidden_size']}"
    return checkpoint.write(base.repository, name, found.policy, found.training)


def _title(params: dict[str, Any]) -> str:
    return f"{params['memory']}, lr {params['lr']:.2g}, hidden size {params['hidden_size']}"


def _said(trial: dict[str, Any]) -> str:
    return f"{trial['return']:.3f} ± {trial['spread']:.3f}"


def _fail(text: str) -> int:
    sys.stderr.write(f"sweep: {text}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
