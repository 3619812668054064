"""tenuto beside its peers: the same Frameconv step, the same sessions, one after the other, several rounds, medians.

    make bench-peers        (python bench/peers/run.py [--rounds 3] [--seconds 4] [--sessions 1 16 64 256])

Peers: Triton with its sequence batcher (the server in the wheel nvidia-pytriton, its Python backend, its own client)
and a websocket server of the openpi kind, which answers message by message. All servers stand by while one is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tenuto_bench.cases import Case
from tenuto_bench.clients import Clients, outcome
from tenuto_bench.served import Served, own_server

HERE = Path(__file__).parent
WARMUP_S = 1.0
TENUTO = ("unary", "stream", "batch")
PEERS = ("triton", "websocket")


@dataclass
class Figures:
    """Of one run."""

    steps_per_s: float
    p50_ms: float
    p99_ms: float
    server_us: float
    client_us: float


@dataclass
class Peer:
    """A peer's server."""

    kind: str
    address: str
    pid: int


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and all below it."""
    total = 0.0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        children = " ".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children"))
    except FileNotFoundError:
        return total
    return total + sum(cpu_s(int(child)) for child in children.split())


def measure_peer(peer: Peer, python: Path, sessions: int, seconds: float) -> Figures:
    """One run of a peer with its own client."""
    command = [python, HERE / "client.py", peer.kind, peer.address, str(sessions), str(WARMUP_S), str(seconds)]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "measuring", f"{peer.kind}: its client failed"
        before = cpu_s(peer.pid)
        share = json.loads(process.stdout.readline())
        server_s = cpu_s(peer.pid) - before
    p50, p99 = np.percentile(share["latencies_ms"], [50, 99])
    us = 1e6 / share["steps"]
    return Figures(share["steps"] / share["seconds"], float(p50), float(p99), server_s * us, share["cpu_s"] * us)


def measure_tenuto(served: Served, mode: Any, sessions: int, seconds: float) -> Figures:
    """One run of tenuto with its own client."""
    clients = Clients(served.address, Case(mode, "frameconv", sessions, 1, sessions if mode == "batch" else 1),
                      WARMUP_S, seconds, sampled=0)  # fmt: skip
    try:
        clients.warm_up()
        before = served.metric("process_cpu_seconds_total")
        shares = clients.shares()
        found = outcome(clients.case, shares, served.metric("process_cpu_seconds_total") - before, None)
    finally:
        clients.close()
    assert found.server_us is not None and not found.errors
    return Figures(found.steps_per_s, found.p50_ms, found.p99_ms, found.server_us, found.client_us)


_ENVIRONMENT = """
import json, pathlib, pytriton, sys, sysconfig
packages = pathlib.Path(pytriton.__file__).parents[1]
path = [p for p in sys.path if p and not p.startswith(sysconfig.get_path("stdlib")) and not p.endswith(".zip")]
print(json.dumps({"packages": str(packages), "path": path, "version": "%d.%d" % sys.version_info[:2]}))
"""
"""Triton's stub brings the system's Python of the same version, with that one's own standard library."""


@contextmanager
def websocket_server(python: Path, repository: Path) -> Iterator[Peer]:
    """Start the websocket peer."""
    command = [str(python), str(HERE / "websocket_server.py"), str(repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Peer("websocket", f"127.0.0.1:{int(process.stdout.readline())}", process.pid)
        finally:
            process.kill()


@contextmanager
def triton_server(python: Path, repository: Path, folder: Path) -> Iterator[Peer]:
    """Start the tritonserver of nvidia-pytriton's wheel on a model repository of its own."""
    told = json.loads(
        subprocess.run([str(python), "-c", _ENVIRONMENT], capture_output=True, text=True, check=True).stdout
    )
    packages, triton = Path(told["packages"]), Path(told["packages"]) / "pytriton" / "tritonserver"
    model, backends = folder / "models" / "frameconv", folder / "backends"
    (model / "1").mkdir(parents=True)
    shutil.copy(HERE / "triton_config.pbtxt", model / "config.pbtxt")
    # The stub's interpreter does not look at PYTHONPATH.
    path = [*told["path"], str(HERE)]
    (model / "1" / "model.py").write_text(f"import sys\nsys.path += {path!r}\nfrom triton_model import *\n")
    shutil.copytree(triton / "backends", backends)
    stub = triton / "python_backend_stubs" / told["version"] / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "TENUTO_BENCH_REPOSITORY": str(repository),
    }
    log = (folder / "triton.log").open("w")
    command = [
        str(triton / "bin" / "tritonserver"), f"--model-repository={folder / 'models'}",
        f"--backend-directory={backends}", "--grpc-port=18001", "--http-port=18000", "--metrics-port=18002",
        "--grpc-address=127.0.0.1", "--http-address=127.0.0.1",
    ]  # fmt: skip
    with log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
        try:
            deadline_s = time.monotonic() + 90
            while not _answers("http://127.0.0.1:18000/v2/health/ready"):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError("tritonserver: " + (folder / "triton.log").read_text())
                time.sleep(0.2)
            yield Peer("triton", "127.0.0.1:18001", process.pid)
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def main() -> None:
    """Run all, in turns, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the peers' environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    runs: dict[tuple[int, str], list[Figures]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        served = stack.enter_context(own_server())
        assert served.repository is not None
        peers: list[Peer] = []
        if "triton" in flags.peers:
            peers.append(stack.enter_context(triton_server(flags.python, served.repository, folder)))
        if "websocket" in flags.peers:
            peers.append(stack.enter_context(websocket_server(flags.python, served.repository)))
        plan = [(n, who) for _ in range(flags.rounds) for n in flags.sessions for who in (*peers, *TENUTO)]
        for n, who in track(plan, "measuring", console=Console(stderr=True), transient=True):
            if isinstance(who, Peer):
                figures, name = measure_peer(who, flags.python, n, flags.seconds), who.kind
            else:
                figures, name = measure_tenuto(served, who, n, flags.seconds), f"tenuto {who}"
            runs.setdefault((n, name), []).append(figures)
    medians = {key: _median(found) for key, found in runs.items()}
    Console(width=110).print(_table(medians))
    if flags.json:
        flags.json.write_text(json.dumps([[*key, vars(f)] for key, f in medians.items()], indent=1) + "\n")


def _median(runs: list[Figures]) -> Figures:
    return Figures(*(statistics.median(column) for column in zip(*(vars(f).values() for f in runs), strict=True)))


def _table(medians: dict[tuple[int, str], Figures]) -> Table:
    table = Table(title="Frameconv, one client process; ratio: steps/s to the best peer's at as many sessions")
    for column in ("sessions", "who", "steps/s", "ratio", "p50 ms", "p99 ms", "server µs", "client µs"):
        table.add_column(column, justify="right")
    for (n, name), f in sorted(medians.items()):
        best = max((g.steps_per_s for (m, other), g in medians.items() if m == n and other in PEERS), default=0.0)
        ratio = f"{f.steps_per_s / best:.2f}" if best else "–"
        table.add_row(str(n), name, f"{f.steps_per_s:,.0f}", ratio, f"{f.p50_ms:.2f}", f"{f.p99_ms:.2f}",
                      f"{f.server_us:,.0f}", f"{f.client_us:,.0f}")  # fmt: skip
    return table


if __name__ == "__main__":
    main()
