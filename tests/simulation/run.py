"""``make simulate``: millions of steps of servers and clients in simulated worlds, one seed after another.

Exits with 1 where a law is broken, and says which, by which seed, and what happened last.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from simulation.world import NUM_STEPS, STORES, Result, simulate

_AT_ONCE = 8
"""Seeds that a process is given at a time."""
_SHOWN_EVENTS = 40


def _simulate_some(seeds: list[int], num_steps: int, store: str) -> list[Result]:
    results = [simulate(seed, num_steps, store=store) for seed in seeds]
    for result in results:
        if result.error is None:
            result.events = []
    return results


def _chunks(first: int) -> Iterator[list[int]]:
    for start in count(first, _AT_ONCE):
        yield list(range(start, start + _AT_ONCE))


def main() -> None:
    """Simulate, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2_000_000, help="session steps in all, which clients got answered")
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--each", type=int, default=NUM_STEPS, help="steps of a seed")
    parser.add_argument("--store", choices=list(STORES), default="", help="with this kind of store only")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these at the latest")
    parser.add_argument("--until-fail", action="store_true", help="stop at the first law that is broken")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every event and what was logged")
    arguments = parser.parse_args()
    console = Console()
    if arguments.seed is not None:
        result = simulate(arguments.seed, arguments.each, keeps_all=arguments.trace, store=arguments.store)
        for event in result.events if arguments.trace else []:
            print(event)
        _tell([result], Counter(result.counts), result.num_steps, 0.0, console)
        if result.error is not None:
            _explain(result, arguments, console, with_events=not arguments.trace)
        sys.exit(result.error is not None)
    failed = _simulate(arguments, console)
    for result in failed:
        _explain(result, arguments, console)
    sys.exit(bool(failed))


def _simulate(arguments: argparse.Namespace, console: Console) -> list[Result]:
    """Run one seed after another in all processes. Returns the runs in which a law was broken."""
    counts, done, failed, num_steps, began_s = Counter[str](), list[Result](), list[Result](), 0, time.monotonic()
    columns = (TextColumn("{task.completed:,.0f} of {task.total:,.0f} steps"), BarColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[more]}"))  # fmt: skip
    chunks = _chunks(arguments.first)
    with (
        ProcessPoolExecutor(arguments.jobs) as pool,
        Progress(*columns, console=console, refresh_per_second=2) as progress,
    ):
        bar = progress.add_task("", total=arguments.steps, more="")

        def submit() -> Future[list[Result]]:
            return pool.submit(_simulate_some, next(chunks), arguments.each, arguments.store)

        running = {submit() for _ in range(2 * arguments.jobs)}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for result in (result for future in finished for result in future.result()):
                done.append(result)
                num_steps += result.num_steps
                counts += result.counts
                if result.error is not None:
                    failed.append(result)
                    progress.console.print(f"seed {result.seed}: {escape(str(result.error))}")
            rate = num_steps / (time.monotonic() - began_s)
            more = f"{len(done):,} seeds, {rate:,.0f} steps/s, {counts['crash']:,} crashes, {len(failed)} failures"
            progress.update(bar, completed=num_steps, more=more)
            is_late = time.monotonic() - began_s > 60 * arguments.minutes
            is_enough = num_steps >= arguments.steps or is_late or (failed and arguments.until_fail)
            if not is_enough:
                running |= {submit() for _ in finished}
    _tell(done, counts, num_steps, time.monotonic() - began_s, console)
    return failed


def _tell(done: list[Result], counts: Counter[str], num_steps: int, took_s: float, console: Console) -> None:
    table = Table("what happened", "how often")
    table.columns[1].justify = "right"
    for what, how_often in sorted(counts.items()):
        table.add_row(what, f"{how_often:,}")
    console.print(table)
    virtual_s = sum(result.virtual_s for result in done)
    rate = f", {num_steps / took_s:,.0f} steps/s" if took_s else ""
    num_answers = sum(result.num_answers for result in done)
    console.print(
        f"{len(done):,} seeds, {num_steps:,} steps of clients, {num_answers:,} answers of servers, "
        f"{virtual_s:,.0f} simulated seconds in {took_s:,.0f} s{rate}"
    )
    if len(done) == 1:
        console.print(f"digest {done[0].digest}")


def _explain(result: Result, arguments: argparse.Namespace, console: Console, *, with_events: bool = True) -> None:
    """Say which law was broken, what happened last, and how to see it again."""
    console.rule(f"seed {result.seed}")
    for event in result.events[-_SHOWN_EVENTS:] if with_events else []:
        print(event[:300])
    more = f" --each {arguments.each}" if arguments.each != NUM_STEPS else ""
    more += f" --store '{arguments.store}'" if arguments.store else ""
    console.print(f"[bold]{escape(str(result.error))}[/bold]")
    console.print(f"again: python tests/simulation/run.py --seed {result.seed}{more} --trace")
    console.print(f"keep it: echo {result.seed} {arguments.each} >> tests/simulation/seeds.txt")


if __name__ == "__main__":
    main()
