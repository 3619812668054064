"""Measures what the metrics cost: a server as it is beside one whose metrics do nothing, in turns.

    python bench/observing.py [--rounds 7] [--seconds 2]

Prints the medians of steps/s and of the server's CPU time per step, and what the metrics cost of each. Cases: the most
observations per step (a lone session), the most requests (64 sessions), the most steps (batches of 256). Each server is
scraped every second.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import threading
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from serving import ACTIONS, OBSERVATIONS, Process, measure, metrics_text, wait_until_ready
from tenuto_models import Policy, PolicyConfig, TrainingProgress, checkpoint

CASES = [("unary", 1), ("stream", 1), ("unary", 64), ("batch", 256)]
SCRAPE_S = 1.0
Figures = tuple[float, float]
WITHOUT = """
import prometheus_client.metrics as metrics
for kind, name in ((metrics.Counter, "inc"), (metrics.Histogram, "observe"), (metrics.Summary, "observe")):
    setattr(kind, name, lambda self, *a, **k: None)
    kind.labels = lambda self, *a, **k: self
from tenuto_server.metrics import Metrics
Metrics.count_request = Metrics.count_episodes = lambda self, *a: None
from tenuto_server.main import main
main()
"""
"""Gauges stay: one tells when the server is ready."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    console, done = Console(width=100), threading.Event()
    figures = {case: (list[Figures](), list[Figures]()) for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy(OBSERVATIONS, ACTIONS, PolicyConfig.for_memory("frameconv"))
        torch.manual_seed(0)
        checkpoint.write(Path(folder), "policy", policy, TrainingProgress())
        flags = ("--repository", folder, "--port", "0", "--metrics-port", "0")
        servers = Process("-m", "tenuto_server.main", *flags), Process("-c", WITHOUT, *flags)
        try:
            for server in servers:
                wait_until_ready(server)
                threading.Thread(target=_scrape, args=(server, done), daemon=True).start()
            for number, case in enumerate(track(CASES * options.rounds, "measuring", console=console, transient=True)):
                for which in (0, 1) if number // len(CASES) % 2 else (1, 0):
                    figures[case][which].append(_measure(servers[which], *case, options.seconds))
        finally:
            done.set()
            for server in servers:
                server.popen.kill()
                server.popen.communicate()
    table = Table(title="with metrics and without (frameconv)")
    for column in ("rpc", "sessions", "steps/s", "without", "cost", "CPU µs/step", "without", "cost"):
        table.add_column(column, justify="right")
    for (mode, sessions), (observed, bare) in figures.items():
        (rate, cpu), (bare_rate, bare_cpu) = (
            tuple(statistics.median(column) for column in zip(*runs, strict=True)) for runs in (observed, bare)
        )
        table.add_row(
            mode, str(sessions), f"{rate:,.0f}", f"{bare_rate:,.0f}", f"{1 - rate / bare_rate:.1%}",
            f"{cpu:,.1f}", f"{bare_cpu:,.1f}", f"{cpu / bare_cpu - 1:.1%}",
        )  # fmt: skip
    console.print(table)


def _measure(server: Process, mode: str, sessions: int, seconds: float) -> Figures:
    """Return (steps/s, microseconds of the server's CPU per step)."""
    before = server.cpu_s()
    rate, _ = asyncio.run(measure(server.port, mode, sessions, seconds, True))
    return rate, 1e6 * (server.cpu_s() - before) / (rate * seconds)


def _scrape(server: Process, done: threading.Event) -> None:
    while not done.wait(SCRAPE_S):
        metrics_text(server)


if __name__ == "__main__":
    main()
