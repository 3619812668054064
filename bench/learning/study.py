"""The learning study: trains every algorithm on every environment, as many runs at once as there are cores.

    python bench/learning/study.py          go on with what is missing, one to two hours on 2 cores
    python bench/learning/study.py --only popgym-RepeatPreviousEasy-v0

Each run leaves one file in bench/learning/results; a run whose file is there is not repeated, so the study can be
stopped at any time and goes on with the next run. At the end report.py makes docs/learning.md's tables and pictures of
what is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STEPS = 300_000
ENVIRONMENTS = tuple(
    f"popgym-{name}Easy-v0"
    for name in ("RepeatPrevious", "RepeatFirst", "CountRecall", "PositionOnlyCartPole", "Autoencode")
)
SEEDS = {"dnc": 3, "frameconv": 3, "lstm": 1, "mlp": 1, "seed-dnc": 1, "seed-frameconv": 1}
"""Algorithm -> number of runs, with seeds from 0."""


@dataclass(frozen=True)
class Run:
    """One training of the study."""

    env_id: str
    algorithm: str
    seed: int

    @property
    def file(self) -> Path:
        """Where its curve is kept."""
        return RESULTS / self.env_id / f"{self.algorithm}-{self.seed}.jsonl"


def runs() -> Iterator[Run]:
    """Yield every run of the study, one environment after the other."""
    for env_id in ENVIRONMENTS:
        for algorithm, seeds in SEEDS.items():
            for seed in range(seeds):
                yield Run(env_id, algorithm, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="ENV", help="only this environment; may be repeated")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once; default: the cores")
    options = parser.parse_args()
    missing = [r for r in runs() if not r.file.exists() and (not options.only or r.env_id in options.only)]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress, ThreadPoolExecutor(options.workers) as workers:
        whole = progress.add_task(f"{len(missing)} runs", total=len(missing))
        for _ in workers.map(lambda run: train(run, progress), missing):
            progress.advance(whole)
    subprocess.run([sys.executable, HERE / "report.py"], check=True)
    if not all(run.file.exists() for run in missing):
        sys.exit("not all runs succeeded; start the study again to repeat those that did not")


def train(run: Run, progress: Progress) -> None:
    """Train in a process of its own and show its iterations, or its last words if it failed."""
    name = f"{run.env_id.removeprefix('popgym-').removesuffix('-v0')} {run.algorithm} {run.seed}"
    task = progress.add_task(name, total=STEPS)
    command = [
        sys.executable, "-W", "ignore", HERE / "run.py", "--algorithm", run.algorithm, "--env", run.env_id,
        "--seed", str(run.seed), "--steps", str(STEPS), "--out", run.file,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        last: list[str] = []
        for line in process.stdout:
            last = [*last[-20:], line]
            if line.startswith("{"):
                progress.update(task, completed=int(line.split('"steps": ')[1].split(",")[0]))
    progress.remove_task(task)
    said = f"failed:\n{''.join(last)}" if process.returncode else "done"
    progress.console.print(f"{name} {said}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
