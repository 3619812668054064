"""Measures training beside the seed's classes and RLlib's LSTM in one run, and prints one table.

    python bench/training.py [--rounds 3] [--algorithms dnc seed-dnc …] [--hidden-size 256]

Every algorithm trains in a process of its own on one torch thread; the processes take turns, so that a machine whose
speed changes treats all alike. Learner samples/s: steps of the batch x epochs by the time of the learner's update, its
connectors included. Whole iteration: environment steps by the time of ``algorithm.train()``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENV_ID = "popgym-RepeatPreviousEasy-v0"
ITERATIONS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("dnc", "seed-dnc", "frameconv", "seed-frameconv", "lstm", "lstm-old")
    parser.add_argument("--algorithms", nargs="+", default=list(names))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.hidden_size)))
        return

    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    figures: dict[str, list[dict[str, float]]] = {name: [] for name in options.algorithms}
    turns = [name for _ in range(options.rounds) for name in options.algorithms]
    for name in track(turns, description="training", console=Console(stderr=True)):
        command = [sys.executable, __file__, "--measure", name, "--hidden-size", str(options.hidden_size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr}")
        figures[name] += json.loads(done.stdout.splitlines()[-1])

    def median(name: str, key: str) -> float:
        return statistics.median(figure[key] for figure in figures[name])

    table = Table(title=f"{ENV_ID}, widths {options.hidden_size}, {platform.machine()}, {os.cpu_count()} cores")
    for column in ("algorithm", "learner samples/s", "ratio to the seed's", "env steps/s", "ratio to the seed's"):
        table.add_column(column, justify="left" if column == "algorithm" else "right")
    for name in options.algorithms:
        cells = [name]
        for key in ("learner_samples_per_s", "env_steps_per_s"):
            reference = f"seed-{name}" if f"seed-{name}" in figures else name
            cells += [f"{median(name, key):,.0f}", f"{median(name, key) / median(reference, key):.2f}"]
        table.add_row(*cells)
    Console(width=100).print(table)
    if "dnc" in figures:
        parts = [key for key in figures["dnc"][0] if key.endswith(" s")]
        where = Table(title="one iteration of dnc, medians")
        where.add_column("part")
        where.add_column("seconds", justify="right")
        for key in parts:
            where.add_row(key.removesuffix(" s"), f"{median('dnc', key):.3f}")
        Console(width=100).print(where)


def measure(algorithm: str, hidden_size: int) -> list[dict[str, float]]:
    """Train a warm-up iteration and then some, and return the figures of each."""
    sys.path.insert(0, str(HERE / "learning"))
    import torch
    from algorithms import algorithm_config, memory_of

    from tenuto_trainer import TrainConfig
    from tenuto_trainer.ppo import local_ray

    cells = hidden_size // 16
    settings = TrainConfig(
        ENV_ID, memory_of(algorithm), Path("unused"), seed=0, num_envs=16, batch_size=4096, minibatch_size=1024,
        num_epochs=2, max_seq_len=64, hidden_size=hidden_size, num_cells=cells, cell_size=16, num_read_heads=4,
    )  # fmt: skip
    torch.set_num_threads(1)
    with local_ray(settings):
        algo = algorithm_config(algorithm, settings).build_algo()
        spent = dict[str, float]()
        _time_parts(algo, spent)
        figures = []
        for iteration in range(ITERATIONS + 1):
            spent.update(dict.fromkeys(spent, 0.0))
            began = time.perf_counter()
            algo.train()
            seconds = time.perf_counter() - began
            if iteration:  # The first one warms up.
                figures.append({
                    "env_steps_per_s": settings.batch_size / seconds,
                    "learner_samples_per_s": settings.batch_size * settings.num_epochs / spent["learning"],
                    "iteration s": seconds,
                    **{f"{part} s": t for part, t in spent.items()},
                })  # fmt: skip
        algo.stop()
    return figures


def _time_parts(algo: Any, spent: dict[str, float]) -> None:
    """Wrap the parts of an iteration so that each adds its seconds to ``spent``; a part that is indented lies in the
    one above it.
    """
    from ray.rllib.algorithms.ppo import ppo

    def time_calls(part: str, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)
        spent[part] = 0.0

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - began

        setattr(owner, name, call)

    if not algo.config.enable_rl_module_and_learner:
        time_calls("learning", ppo, "train_one_step")
        time_calls("learning", ppo, "multi_gpu_train_one_step")
        return
    runner, learner = algo.env_runner, algo.learner_group._learner
    time_calls("sampling", runner, "sample")
    time_calls("  connectors to the module", runner, "_env_to_module")
    time_calls("  policy step", runner.module, "_forward")
    time_calls("  connectors to the environment", runner, "_module_to_env")
    time_calls("  environments", runner.env, "step")
    time_calls("learning", algo.learner_group, "update")
    time_calls("  connectors and advantages", learner, "_learner_connector")
    module = learner.module["default_policy"]
    time_calls("  forward", module, "_forward_train")
    time_calls("  backward", learner, "compute_gradients")
    time_calls("  clipping", learner, "postprocess_gradients")
    time_calls("  optimizer", learner, "apply_gradients")


if __name__ == "__main__":
    main()
