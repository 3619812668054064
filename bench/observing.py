"""Measures what the metrics cost: a server as it is beside one whose metrics do nothing, in turns.

    python bench/observing.py [--rounds 40] [--seconds 1]

Both servers are measured one right after the other, so that a pair shares the machine's mood; what is told is the
median of the pairs' ratios, with the interval that holds the true median in 95 of 100 runs. Cases: most observations
per step (a lone session), the most requests (64 sessions), the most steps (batches of 256). Each server is scraped as
often as deploy/prometheus does; what a scrape takes is told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import math
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
SCRAPE_S = 15.0
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
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1.0)
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
            scrape_ms = _scrape_ms(servers[0])
        finally:
            done.set()
            for server in servers:
                server.popen.kill()
                server.popen.communicate()
    table = Table(title="with metrics and without (frameconv)")
    for column in ("rpc", "sessions", "steps/s", "cost", "95 %", "CPU µs/step", "cost", "95 %"):
        table.add_column(column, justify="right")
    for (mode, sessions), (observed, bare) in figures.items():
        rates, cpus = zip(*observed, strict=True)
        bare_rates, bare_cpus = zip(*bare, strict=True)
        table.add_row(
            mode, str(sessions),
            f"{statistics.median(rates):,.0f}", *_cost([1 - a / b for a, b in zip(rates, bare_rates, strict=True)]),
            f"{statistics.median(cpus):,.1f}", *_cost([a / b - 1 for a, b in zip(cpus, bare_cpus, strict=True)]),
        )  # fmt: skip
    console.print(table)
    console.print(f"a scrape takes {scrape_ms:.1f} ms of the server's CPU, every {SCRAPE_S:g} s")


def _cost(costs: list[float]) -> tuple[str, str]:
    """Return the median and, from order statistics, its interval."""
    ordered, n = sorted(costs), len(costs)
    # How many of n lie below the median is binomial, so about normal with deviation sqrt(n) / 2.
    reach = round(1.96 * math.sqrt(n) / 2)
    low, high = ordered[max(0, n // 2 - reach - 1)], ordered[min(n - 1, n // 2 + reach)]
    return f"{statistics.median(costs):.1%}", f"{low:.1%} to {high:.1%}"


def _measure(server: Process, mode: str, sessions: int, seconds: float) -> Figures:
    """Return (steps/s, microseconds of the server's CPU per step)."""
    before = server.cpu_s()
    rate, _ = asyncio.run(measure(server.port, mode, sessions, seconds, True))
    return rate, 1e6 * (server.cpu_s() - before) / (rate * seconds)


def _scrape_ms(server: Process, times: int = 20) -> float:
    before = server.cpu_s()
    for _ in range(times):
        metrics_text(server)
    return 1e3 * (server.cpu_s() - before) / times


def _scrape(server: Process, done: threading.Event) -> None:
    while not done.wait(SCRAPE_S):
        metrics_text(server)


if __name__ == "__main__":
    main()
