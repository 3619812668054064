"""Measures one step of the server's engine without a server, on one thread, in turns with what else could compute it.

    make bench-engine       (python bench/engine.py [--rounds 5] [--seconds 0.3] [--rows 1 16 64 256 1024])

engine: ``Engine.run``, all of it: gather, forward pass, sampling, scatter, results as numpy. Policy.step: the forward
pass in plain torch, its state in hand. Package dnc, where it is installed: the step of the DNC of that name on PyPI,
which POPGym trains, at the same sizes; the memory core alone, which has less to do, and in the policy, between the same
layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from report import Goal, Table, figure, machine, ratio, table_of
from tenuto_bench.served import ACTIONS, MEMORIES, OBSERVATIONS
from tenuto_models import Checkpoint, Policy, PolicyConfig, TrainingProgress
from tenuto_models.dnc import DNCConfig
from tenuto_models.memory import State
from tenuto_server.config import ServerConfig
from tenuto_server.engine import Engine, StepRows
from tenuto_server.policies import ServedPolicy

ENGINE, PLAIN, PACKAGE, PACKAGE_POLICY = "engine", "Policy.step", "package dnc", "package dnc in the policy"
WANTED = {1: 0.2, 256: 0.6}
"""Rows -> the engine's time by the package's."""
Step = Callable[[], Any]
Microseconds = dict[tuple[str, int, str], float]
"""(memory, rows, who) -> per batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each turn")
    parser.add_argument("--json", type=Path, help="write the medians there")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=110)
    steps = {
        (memory, rows, who): step
        for memory in MEMORIES
        for rows in flags.rows
        for who, step in contenders(memory, rows).items()
    }
    found: dict[tuple[str, int, str], list[float]] = {key: [] for key in steps}
    with torch.inference_mode():
        for step in track(steps.values(), "warming up", console=Console(stderr=True), transient=True):
            measure_us(step, 0.0)
        turns = list(steps) * flags.rounds
        for key in track(turns, "measuring", console=Console(stderr=True), transient=True):
            found[key].append(measure_us(steps[key], flags.seconds))
    medians = {key: statistics.median(times) for key, times in found.items()}
    goals = goals_of(medians)
    table(medians).print(console)
    table_of(goals).print(console)
    if flags.json:
        judged = [{**vars(goal), "held": goal.held} for goal in goals]
        told = {"machine": machine(), "rows": [[*key, us] for key, us in medians.items()], "goals": judged}
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps(told, indent=1) + "\n")


def contenders(memory: str, rows: int) -> dict[str, Step]:
    """Return one step of a batch for each."""
    found = {ENGINE: engine_step(memory, rows), PLAIN: plain_step(memory, rows)}
    if memory == "dnc" and find_spec("dnc"):
        found |= {PACKAGE: package_step(rows), PACKAGE_POLICY: plain_step(memory, rows, PackageCore())}
    return found


def policy_of(memory: str) -> Policy:
    """Return the policy of random weights that the servers are measured with."""
    torch.manual_seed(0)
    return Policy(OBSERVATIONS, ACTIONS, PolicyConfig.for_memory(memory)).eval().requires_grad_(False)


def engine_step(memory: str, rows: int) -> Step:
    """Step one batch of sessions in the middle of their episodes."""
    config = ServerConfig(repository=Path("unused"), max_batch=rows)
    engine = Engine(torch.device("cpu"), config.buckets)
    checkpoint = Checkpoint(memory, 1, policy_of(memory), TrainingProgress(), 0.0, "")
    served = ServedPolicy(checkpoint, engine, rows, server_epoch=1)
    version = served.prepare(checkpoint, engine)
    slots = np.array([version.pool.lease() for _ in range(rows)], np.int64)
    observations, index = OBSERVATIONS.sample()[None].repeat(rows, 0), 0

    def step() -> None:
        nonlocal index
        columns = StepRows(
            slots=slots,
            generations=version.pool.generation[slots],
            observations=observations,
            episode_starts=np.full(rows, index == 0),
            seeds=slots.astype(np.uint64),
            step_indices=np.full(rows, index, np.uint64),
            deterministic=np.zeros(rows, np.bool_),
            rewards=np.zeros(rows, np.float32),
            session_ids=slots.astype(np.uint64),
        )
        engine.run(version, columns)
        index += 1

    return step


def plain_step(memory: str, rows: int, core: nn.Module | None = None) -> Step:
    """Step the policy's own torch code, with another core where one is given."""
    policy = policy_of(memory)
    if core is not None:
        policy.add_module("core", core)
    observations, state = torch.from_numpy(OBSERVATIONS.sample()[None].repeat(rows, 0)), policy.initial_state(rows)

    def step() -> None:
        nonlocal state
        _, state = policy.step(observations, state)

    return step


def package_step(rows: int) -> Step:
    """Step the package's core by itself."""
    core, features = PackageCore(), torch.randn(rows, PolicyConfig().feature_size)
    return lambda: core.step(features, {})


class PackageCore(nn.Module):
    """The package's DNC at POPGym's sizes, with the output layer that POPGym gives it. Keeps its state itself."""

    def __init__(self) -> None:
        from dnc import DNC  # pyright: ignore[reportMissingImports]

        super().__init__()
        sizes, features = DNCConfig(), PolicyConfig().feature_size
        self.dnc: Any = DNC(
            features, sizes.hidden_size, num_layers=1, num_hidden_layers=1, nr_cells=sizes.num_cells,
            cell_size=sizes.cell_size, read_heads=sizes.num_read_heads,
        )  # fmt: skip
        self.dnc.output = nn.Linear(self.dnc.output.in_features, sizes.hidden_size)
        self.eval().requires_grad_(False)
        self._after: Any = (None, None, None)

    def step(self, features: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """Advance by one step of ``[B, F]``; hands ``state`` through."""
        output, self._after = self.dnc(features[:, None], self._after)
        return output[:, 0], state


def measure_us(step: Step, seconds: float) -> float:
    """Return the mean microseconds of a step over a turn, which has three of them at least."""
    began_s, count = time.perf_counter(), 0
    while (took_s := time.perf_counter() - began_s) < seconds or count < 3:
        step()
        count += 1
    return 1e6 * took_s / count


def goals_of(medians: Microseconds) -> list[Goal]:
    """Judge the DNC's step beside the package's."""
    return [
        Goal(f"DNC, {rows} rows: the engine's step, gather and scatter included, of the package's", got, wanted)
        for rows, wanted in WANTED.items()
        for got in [ratio(medians.get(("dnc", rows, ENGINE)), medians.get(("dnc", rows, PACKAGE)))]
    ]


def table(medians: Microseconds) -> Table:
    """One line per memory and number of rows."""
    headers = (
        "memory", "rows", "engine µs", "µs per row", "Policy.step µs", "of it", "package dnc µs", "of it",
        "in the policy µs", "of it",
    )  # fmt: skip
    lines: list[list[str]] = []
    for memory, rows in dict.fromkeys(key[:2] for key in medians):
        engine = medians[memory, rows, ENGINE]
        others = [medians.get((memory, rows, who)) for who in (PLAIN, PACKAGE, PACKAGE_POLICY)]
        cells = [cell for other in others for cell in (figure(other), figure(ratio(engine, other), 2))]
        lines.append([memory, str(rows), figure(engine), figure(engine / rows, 1), *cells])
    return Table("One batch on one thread; of it: the engine's time by the other's", headers, lines)


if __name__ == "__main__":
    main()
