"""Offers a server more than it can do, up to ten times as much, and measures what it still does.

    python bench/overload/run.py [--levels 0.5 1 2 5 10] [--seconds 8] [--json FILE]
    python bench/overload/run.py --soak 300

Capacity is what closed loops get. Then steps are offered at multiples of it in an open loop, Poisson arrivals from
client processes that neither wait nor back off. Latencies count from when a step was due. The policy is a large DNC and
one thread computes it, which stands for a device beside the cores that handle messages: clients and server share those.

With --soak the load stays, at the first of the levels, and the server's memory is watched.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tenuto_bench.served import ACTIONS, OBSERVATIONS, Served, serve
from tenuto_models import DNCConfig, Policy, PolicyConfig, TrainingProgress, checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import Goal, Table, figure, machine, table_of

CORE = DNCConfig(hidden_size=1536, num_cells=64, cell_size=32, num_read_heads=4)
WARMUP_S = 2.0
SOAK_SAMPLE_S = 5.0


@dataclass(frozen=True)
class Level:
    """What came of one offered load."""

    factor: float
    """Of the capacity."""
    offered_per_s: float
    goodput_per_s: float
    refused_per_s: float
    failed: dict[str, int]
    """Rows by their reason."""
    p50_ms: float
    p99_ms: float
    """Of admitted messages, from when they were due."""
    refused_p99_ms: float
    unsent: int
    """Messages for which the clients had no session free."""
    server_cpus: float
    rss_mb: float


class Clients:
    """The client processes."""

    def __init__(self, served: Served, flags: argparse.Namespace) -> None:
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("client.py"))]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(flags.processes)
        ]
        self.num_groups = flags.sessions // flags.rows // flags.processes
        self._ask(
            address=served.address,
            deadline_ms=flags.deadline_ms,
            num_groups=self.num_groups,
            rows=flags.rows,
            num_streams=flags.streams,
        )

    def load(self, messages_per_s: float | None, in_flight: int, seconds: float) -> list[dict[str, Any]]:
        """Have all of them send, together at this rate or with so many messages under way."""
        share = len(self._processes)
        return self._ask(
            messages_per_s=None if messages_per_s is None else messages_per_s / share,
            in_flight=max(1, in_flight // share),
            warmup_s=WARMUP_S,
            seconds=seconds,
        )

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _ask(self, **order: Any) -> list[dict[str, Any]]:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        answers: list[dict[str, Any]] = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                sys.exit("overload: a client process ended")
            answers.append(json.loads(line))
        return answers


def rss_mb(pid: int | None) -> float:
    """Memory of a process that is in use."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else float("nan")


def measure(served: Served, clients: Clients, flags: argparse.Namespace, capacity: float, factor: float) -> Level:
    """Offer a multiple of the capacity."""
    cpu_s, began_s = served.metric("process_cpu_seconds_total"), time.monotonic()
    answers = clients.load(factor * capacity / flags.rows, 0, flags.seconds)
    cpus = (served.metric("process_cpu_seconds_total") - cpu_s) / (time.monotonic() - began_s)
    failed = sum((Counter(answer["failed"]) for answer in answers), Counter[str]())
    admitted = [ms for answer in answers for ms in answer["latencies_ms"]] or [float("nan")]
    refused = [ms for answer in answers for ms in answer["refused_ms"]]
    return Level(
        factor,
        offered_per_s=sum(answer["offered"] for answer in answers) / flags.seconds,
        goodput_per_s=sum(answer["good"] for answer in answers) / flags.seconds,
        refused_per_s=sum(failed.values()) / flags.seconds,
        failed=dict(failed),
        p50_ms=float(np.percentile(admitted, 50)),
        p99_ms=float(np.percentile(admitted, 99)),
        refused_p99_ms=float(np.percentile(refused, 99)) if refused else float("nan"),
        unsent=sum(answer["unsent"] for answer in answers),
        server_cpus=cpus,
        rss_mb=rss_mb(served.pid),
    )


def soak(served: Served, clients: Clients, flags: argparse.Namespace, capacity: float) -> dict[str, Any]:
    """Keep the load up and watch the memory: its slope over the second half."""
    samples: list[tuple[float, float]] = []
    began_s = time.monotonic()
    while (elapsed_s := time.monotonic() - began_s) < flags.soak:
        clients.load(flags.levels[0] * capacity / flags.rows, 0, SOAK_SAMPLE_S)
        samples.append((elapsed_s, rss_mb(served.pid)))
    late = samples[len(samples) // 2 :]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope * 60 if len(late) > 1 else float("nan")
    return {"factor": flags.levels[0], "samples": samples, "mb_per_minute": slope, "queued": left(served)}


def left(served: Served) -> float:
    """Steps that still wait, which must be none when nobody asks for any."""
    return served.metric("tenuto_queued_rows")


def report(levels: list[Level], capacity: float, bound_ms: float) -> tuple[Table, Table]:
    """The levels, and whether the goals are held."""
    peak = max(level.goodput_per_s for level in levels)
    rows = [
        [
            f"{level.factor:g}", figure(level.offered_per_s), figure(level.goodput_per_s),
            figure(level.goodput_per_s / peak, 2), figure(level.p50_ms), figure(level.p99_ms),
            figure(level.refused_per_s), figure(level.refused_p99_ms if level.refused_per_s else None),
            ", ".join(sorted(level.failed)) or "–",
            figure(level.unsent), figure(level.server_cpus, 2), figure(level.rss_mb),
        ]
        for level in levels
    ]  # fmt: skip
    headers = (
        "load", "offered/s", "goodput/s", "of peak", "p50 ms", "p99 ms", "refused/s", "refusal p99 ms", "reasons",
        "unsent", "server CPUs", "server MB",
    )  # fmt: skip
    worst = max(levels, key=lambda level: level.factor)
    goals = [
        Goal(f"goodput at {worst.factor:g}x, of its peak", worst.goodput_per_s / peak, 0.9, at_least=True),
        Goal(f"p99 of admitted steps at {worst.factor:g}x, ms", worst.p99_ms, bound_ms),
    ]
    return Table(f"Overload; capacity {capacity:,.0f} steps/s", headers, rows), table_of(goals)


def main() -> None:
    """Measure and print."""
    flags = _parse()
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        policy = Policy(OBSERVATIONS, ACTIONS, PolicyConfig(CORE))
        checkpoint.write(Path(folder), "policy", policy, TrainingProgress())
        more = ("--capacity", str(flags.sessions), "--max-queue-delay-ms", str(flags.max_queue_delay_ms),
                "--compute-threads", "1")  # fmt: skip
        with serve(Path(folder), flags=more) as served:
            clients = Clients(served, flags)
            try:
                found: dict[str, Any] = {"machine": machine(), "flags": vars(flags) | {"json": str(flags.json)}}
                # Twice a batch of 256 under way, so that the device never waits.
                in_flight = max(2, 512 // flags.rows)
                closed = clients.load(None, in_flight, flags.seconds)
                capacity = sum(answer["good"] for answer in closed) / flags.seconds
                found["capacity_per_s"] = capacity
                if flags.soak:
                    found["soak"] = soak(served, clients, flags, capacity)
                    for at_s, mb in found["soak"]["samples"]:
                        console.print(f"{at_s:7.0f} s  {mb:7.1f} MB")
                    slope = found["soak"]["mb_per_minute"]
                    console.print(f"second half: {slope:+.2f} MB a minute; {found['soak']['queued']:g} steps left")
                else:
                    levels = [measure(served, clients, flags, capacity, factor) for factor in flags.levels]
                    found["levels"] = [asdict(level) for level in levels]
                    for table in report(levels, capacity, 2 * flags.max_queue_delay_ms):
                        table.print(console)
            finally:
                clients.close()
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.5, 1, 2, 5, 10], help="times the capacity")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each level")
    parser.add_argument("--processes", type=int, default=2, help="of clients")
    parser.add_argument("--streams", type=int, default=8, help="of each process")
    parser.add_argument("--rows", type=int, default=16, help="sessions of one message")
    parser.add_argument("--sessions", type=int, default=8192, help="of all processes")
    parser.add_argument("--deadline-ms", type=int, default=5000, help="that a step may wait")
    parser.add_argument("--max-queue-delay-ms", type=float, default=500.0, help="of the server")
    parser.add_argument("--soak", type=float, default=0.0, metavar="SECONDS", help="watch the memory instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
