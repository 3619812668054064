"""Measures what the metrics cost: a server as it is beside one whose metrics do nothing, in turns.

    python bench/observing.py [--rounds 7] [--seconds 2]

Prints steps/s of both and the median of the ratios of neighbouring turns, for the case with the most observations per
step (a lone session) and for the one with the most steps (batches of 256). Each server is scraped each second.
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
WITHOUT = """
import prometheus_client.metrics as metrics
for kind, names in ((metrics.Counter, ["inc"]), (metrics.Histogram, ["observe"]), (metrics.Summary, ["observe"])):
    for name in names:
        setattr(kind, name, lambda self, *a, **k: None)
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
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in CASES}
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
            for mode, sessions in track(CASES * options.rounds, "measuring", console=console, transient=True):
                observed, bare = (
                    asyncio.run(measure(s.port, mode, sessions, options.seconds, True))[0] for s in servers
                )
                rates[mode, sessions].append((observed, bare))
        finally:
            done.set()
            for server in servers:
                server.popen.kill()
                server.popen.communicate()
    table = Table(title="steps/s with metrics and without (frameconv)")
    for column in ("rpc", "sessions", "with", "without", "cost"):
        table.add_column(column, justify="right")
    for (mode, sessions), pairs in rates.items():
        cost = 1 - statistics.median(observed / bare for observed, bare in pairs)
        medians = (statistics.median(column) for column in zip(*pairs, strict=True))
        table.add_row(mode, str(sessions), *(f"{rate:,.0f}" for rate in medians), f"{cost:.1%}")
    console.print(table)


def _scrape(server: Process, done: threading.Event) -> None:
    while not done.wait(SCRAPE_S):
        metrics_text(server)


if __name__ == "__main__":
    main()
