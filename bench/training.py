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
    if {"dnc"} <= figures.keys():
        shares = {key: median("dnc", key) for key in figures["dnc"][0] if key.endswith("_s_share")}
        print(
            "one iteration of dnc, medians:",
            ", ".join(f"{k.removesuffix('_s_share')} {v:.2f} s" for k, v in shares.items()),
        )


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
        spent = {"learn": 0.0}
        _time_the_learner(algo, spent)
        figures = []
        for iteration in range(ITERATIONS + 1):
            spent["learn"] = 0.0
            began = time.perf_counter()
            algo.train()
            seconds = time.perf_counter() - began
            if iteration:  # The first one warms up.
                figures.append({
                    "env_steps_per_s": settings.batch_size / seconds,
                    "learner_samples_per_s": settings.batch_size * settings.num_epochs / spent["learn"],
                    "sample_s_share": seconds - spent["learn"],
                    "learn_s_share": spent["learn"],
                })  # fmt: skip
        algo.stop()
    return figures


def _time_the_learner(algo: Any, spent: dict[str, float]) -> None:
    from ray.rllib.algorithms.ppo import ppo

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent["learn"] += time.perf_counter() - began

        return call

    if algo.config.enable_rl_module_and_learner:
        algo.learner_group.update = timed(algo.learner_group.update)
    else:
        ppo.train_one_step = timed(ppo.train_one_step)
        ppo.multi_gpu_train_one_step = timed(ppo.multi_gpu_train_one_step)


if __name__ == "__main__":
    main()
