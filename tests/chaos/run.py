"""``make chaos``: hundreds of episodes on servers that are killed again and again, and the table of what came of it.

Exits with 1 where an action differs from the undisturbed run's, or a step was lost or doubled.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from chaos.fleet import Fleet
from chaos.monkey import Report, run


def main() -> None:
    """Run both stores and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stores", nargs="+", choices=["sqlite", "redis"], default=["sqlite", "redis"])
    parser.add_argument("--environments", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1000, help="of each environment")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the reports to this file, too")
    arguments = parser.parse_args()
    # The clients tell of each restart.
    logging.basicConfig(level=logging.ERROR)
    warnings.simplefilter("ignore")
    console = Console()
    reports: dict[str, Report] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
               TimeElapsedColumn(), TextColumn("{task.fields[faults]}"))  # fmt: skip
    try:
        for store in arguments.stores:
            with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as folder:
                reports[store] = run(
                    Path(folder), store, num_environments=arguments.environments, num_steps=arguments.steps,
                    num_kills=arguments.kills, seed=arguments.seed, tell=partial(_tell, progress, {}, store),
                )  # fmt: skip
    finally:
        console.print(_table(reports, f"{arguments.environments} environments of POPGym, seed {arguments.seed}"))
        if arguments.json:
            found = {"reports": {name: vars(report) for name, report in reports.items()}}
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    if any(report.num_different or report.num_miscounted for report in reports.values()):
        sys.exit(1)


def _tell(progress: Progress, bars: dict[str, TaskID], store: str, phase: str, fleet: Fleet, report: Report) -> None:
    if phase not in bars:
        bars[phase] = progress.add_task(f"{store}, {phase}", total=fleet.total, faults="")
    progress.update(bars[phase], completed=fleet.num_done, faults=f"{report.faults['servers killed']} kills")


def _table(reports: dict[str, Report], title: str) -> Table:
    table = Table("", *reports, title=title)
    faults = sorted({name for report in reports.values() for name in report.faults})
    rows: list[tuple[str, list[str]]] = [
        ("steps", [f"{r.num_steps:,}" for r in reports.values()]),
        ("seconds", [f"{r.took_s:.0f}" for r in reports.values()]),
        ("longest pause of an environment, s", [f"{r.longest_pause_s:.1f}" for r in reports.values()]),
        *((name, [str(r.faults[name]) for r in reports.values()]) for name in faults),
        ("environments with another action", [str(r.num_different) for r in reports.values()]),
        ("sessions with steps lost or doubled", [str(r.num_miscounted) for r in reports.values()]),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    main()
