"""Measures what ``--durability`` costs: servers with each store beside one without, in turns.

    python bench/durability.py [--rounds 7] [--seconds 2] [--json FILE]

All servers run at once and are measured one right after the other, so that a round shares the machine's mood; what is
told is the median of the rounds' ratios to the server without a store. Every step moves a state of 4.8 kB (the DNC at
POPGym's sizes). Redis keeps a log of every write (``appendonly yes``), on this machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from report import Table, figure, machine
from tenuto_bench.cases import Case, Outcome
from tenuto_bench.main import measure
from tenuto_bench.served import Served, publish, serve

CASES = [
    Case("unary", "dnc", 1),
    Case("stream", "dnc", 16),
    Case("batch", "dnc", 256, rows=256),
    Case("batch", "dnc", 2048, rows=256),
]
NONE = "none"
Found = dict[Case, dict[str, list[Outcome]]]
"""Of each case and store the rounds, in order."""
WARMUP_S = 1.0
"""Longer than some intervals of snapshots."""


@contextmanager
def redis_server(folder: Path, *flags: str) -> Generator[str]:
    """Start a Redis and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    place = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes")
    with subprocess.Popen(["redis-server", *place, *flags], stdout=subprocess.DEVNULL) as process:
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    flags = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        publish(folder / "repository", ("dnc",))
        stores: dict[str, str | None] = {NONE: None, "sqlite": f"sqlite:{folder / 'sessions.db'}"}
        if shutil.which("redis-server"):
            for name, sync in (("redis", "everysec"), ("redis, every write synced", "always")):
                (home := folder / sync).mkdir()
                stores[name] = stack.enter_context(redis_server(home, "--appendfsync", sync))
        else:
            console.print("redis-server is not installed: Redis is not measured")
        servers = {name: stack.enter_context(_serve(folder / "repository", url)) for name, url in stores.items()}
        found: Found = {case: {name: [] for name in servers} for case in CASES}
        for number in track(range(flags.rounds), "measuring", console=console, transient=True):
            for case, outcomes in found.items():
                for name in list(servers)[:: 1 if number % 2 else -1]:
                    outcomes[name].append(measure(servers[name], case, WARMUP_S, flags.seconds, sampled=0))
        written = {name: _written(server) for name, server in servers.items() if name != NONE}
    table_of(found).print(console)
    console.print("snapshots written per second of writing: " + ", ".join(f"{k} {v:,.0f}" for k, v in written.items()))
    if flags.json:
        rows = [(name, asdict(o)) for per in found.values() for name, all_ in per.items() for o in all_]
        told = {"machine": machine(), "written_per_s": written, "rows": rows}
        flags.json.write_text(json.dumps(told, indent=1) + "\n")


def _serve(repository: Path, url: str | None) -> Any:
    return serve(repository, flags=("--durability", url) if url else ())


def _written(server: Served) -> float:
    seconds = server.metric("tenuto_snapshot_seconds_sum")
    return server.metric("tenuto_snapshots_total") / seconds if seconds else 0.0


def read(rows: Sequence[tuple[str, dict[str, Any]]]) -> Found:
    """Return what a kept run has found."""
    found: Found = {}
    for store, row in rows:
        outcome = Outcome(**row | {"case": Case(**row["case"])})
        found.setdefault(outcome.case, {}).setdefault(store, []).append(outcome)
    return found


def table_of(found: Found) -> Table:
    """One row per case and store."""
    rows: list[list[str]] = []
    for case, outcomes in found.items():
        for name, measured in outcomes.items():
            pairs = list(zip(measured, outcomes[NONE], strict=True))
            cpus = [o.server_us for o in measured if o.server_us is not None]
            rows.append(
                [
                    f"{case.mode}, {case.sessions}" if name == NONE else "",
                    name,
                    figure(statistics.median(o.steps_per_s for o in measured)),
                    figure(statistics.median(a.steps_per_s / b.steps_per_s for a, b in pairs), 2),
                    figure(statistics.median(o.p50_ms for o in measured), 2),
                    figure(statistics.median(o.p99_ms for o in measured), 2),
                    figure(statistics.median(cpus), 1),
                    str(sum(sum(o.errors.values()) for o in measured)),
                ]
            )
    headers = ("rpc, sessions", "store", "steps/s", "of none", "p50 ms", "p99 ms", "server µs/step", "errors")
    return Table("What durability costs (DNC)", headers, rows, num_left=2)


if __name__ == "__main__":
    main()
