"""Measures what the metrics cost: a server as it is beside one whose metrics do nothing, in turns.

    python bench/observing.py [--rounds 40] [--seconds 1]

Both servers are measured one right after the other, so that a pair shares the machine's mood; what is told is the
median of the pairs' ratios, with the interval that holds the true median in 95 of 100 runs. Cases: most observations
per step (a lone session), the most requests (64 sessions), the most steps (batches of 256). Each server is scraped as
often as deploy/prometheus does; what a scrape takes is told apart.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tenuto_bench.cases import Case
from tenuto_bench.main import PROCESS_CPU, measure
from tenuto_bench.served import Served, publish, serve

CASES = [
    Case("unary", "frameconv", 1),
    Case("stream", "frameconv", 1),
    Case("unary", "frameconv", 64),
    Case("batch", "frameconv", 256, rows=256),
]
SCRAPE_S, WARMUP_S = 15.0, 0.3
Figures = tuple[float, float]
WITHOUT = """
import prometheus_client.metrics as metrics
for kind, name in ((metrics.Counter, "inc"), (metrics.Histogram, "observe"), (metrics.Summary, "observe")):
    setattr(kind, name, lambda self, *a, **k: None)
    kind.labels = lambda self, *a, **k: self
from tenuto_server.histogram import Series
Series.observe = lambda self, *a: None
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
    with ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        publish(repository, ("frameconv",))
        servers = stack.enter_context(serve(repository)), stack.enter_context(serve(repository, ("-c", WITHOUT)))
        stack.callback(done.set)
        for server in servers:
            threading.Thread(target=_scrape, args=(server, done), daemon=True).start()
        for number, case in enumerate(track(CASES * options.rounds, "measuring", console=console, transient=True)):
            for which in (0, 1) if number // len(CASES) % 2 else (1, 0):
                found = measure(servers[which], case, WARMUP_S, options.seconds, sampled=0)
                assert found.server_us is not None and not found.errors
                figures[case][which].append((found.steps_per_s, found.server_us))
        scrape_ms = _scrape_ms(servers[0])
    table = Table(title="with metrics and without (frameconv)")
    for column in ("rpc", "sessions", "steps/s", "cost", "95 %", "CPU µs/step", "cost", "95 %"):
        table.add_column(column, justify="right")
    for case, (observed, bare) in figures.items():
        rates, cpus = zip(*observed, strict=True)
        bare_rates, bare_cpus = zip(*bare, strict=True)
        table.add_row(
            case.mode, str(case.sessions),
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


def _scrape_ms(server: Served, times: int = 20) -> float:
    before = server.metric(PROCESS_CPU)
    for _ in range(times):
        spent = server.metric(PROCESS_CPU)
    return 1e3 * (spent - before) / times


def _scrape(server: Served, done: threading.Event) -> None:
    while not done.wait(SCRAPE_S):
        server.metric(PROCESS_CPU)


if __name__ == "__main__":
    main()
