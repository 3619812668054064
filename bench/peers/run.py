"""tenuto beside its peers and floors: the same Frameconv step, the same sessions, in turns, several rounds, medians.

    make bench-peers        (python bench/peers/run.py [--rounds 3] [--seconds 1.5] [--sessions 1 16 64 256])
    make bench              (the same without peers, which needs no installation)

Peers: Triton with its sequence batcher (the server in the wheel nvidia-pytriton, its Python backend, its own client),
Ray Serve (gRPC proxy, consistent-hash router, @serve.batch) and a websocket server of the openpi kind, which answers
message by message. Floors: an echo (grpc.aio that answers the same messages at once, driven by bare stubs) and the
forward pass alone (Policy.step on as many rows, one thread, no server). While one is measured the servers of the others
are paused. A peer that is not installed or dies is told in its row, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from peers import processes
from peers.contenders import FORWARD, PEERS, Contender, contenders
from peers.goals import goals_of
from peers.rows import Figures, Key, Rows
from peers.servers import Server, echo_server, ray_server, triton_server, websocket_server
from report import machine, table_of
from tenuto_bench.cases import Case
from tenuto_bench.clients import Clients, LoadError, outcome
from tenuto_bench.served import OBSERVATIONS, Served, ServerError, publish, serve
from tenuto_models import checkpoint

WARMUP_S, FORWARD_S = 0.5, 0.5
ROWS_OF_THREADS = 256
"""Batches of so many rows are computed on threads of their own, whose CPU can be told apart."""


def main() -> None:
    flags = _parse()
    rows, venvs = Rows(), flags.venvs.absolute()
    console, progress = Console(width=170), Console(stderr=True)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        repository = folder / "repository"
        publish(repository)
        servers = {
            "tenuto": Server(partial(serve, repository)),
            "echo": Server(partial(echo_server, folder)),
            "triton": Server(partial(triton_server, venvs, repository, folder)),
            "ray": Server(partial(ray_server, venvs, repository, folder)),
            "websocket": Server(partial(websocket_server, venvs, repository, folder)),
        }
        for server in servers.values():
            stack.callback(server.close)
        turns = turns_of(contenders(venvs, flags.peers), flags.sessions, flags.processes) * flags.rounds
        # Interrupted, it tells what it has.
        with suppress(KeyboardInterrupt):
            for who, case in track(turns, "measuring", console=progress, transient=True):
                if who is None:
                    row = rows.at(Key(case.policy, case.sessions, 1, FORWARD, "floor"))
                    row.turns.append(forward_alone(repository, case.policy, case.sessions))
                    continue
                row = rows.at(Key(case.policy, case.sessions, case.processes, who.name, who.kind))
                try:
                    with servers[who.server].awake() as served:
                        row.turns.append(measure(who, served, case, flags.seconds))
                except (ServerError, LoadError) as error:
                    row.failures.append(str(error))
    goals = goals_of(rows)
    rows.table().print(console)
    table_of(goals).print(console)
    if flags.json:
        judged = [{**vars(goal), "held": goal.held} for goal in goals]
        told = {"machine": machine(), "rows": rows.to_json(), "goals": judged}
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps(told, indent=1) + "\n")


def turns_of(
    who: Sequence[Contender], sessions: Sequence[int], processes: int
) -> list[tuple[Contender | None, Case]]:  # fmt: skip
    """Return one round: who takes which case; None is the forward pass alone."""
    turns: list[tuple[Contender | None, Case]] = []
    for n in sessions:
        turns += [(each, each.case(n, 1)) for each in who]
        turns.append((None, Case("batch", "frameconv", n, rows=n)))
    if processes:
        turns += [(each, each.case(processes, processes)) for each in who if each.mode != "batch"]
    batch = next(each for each in who if each.mode == "batch")
    dnc = batch.case(max(sessions), 1, "dnc")
    return [*turns, (batch, dnc), (None, dnc)]


def measure(who: Contender, served: Served, case: Case, seconds: float) -> Figures:
    """Take one turn. Raises LoadError or ServerError."""
    assert served.pid is not None
    clients = Clients(served.address, case, WARMUP_S, seconds, sampled=0, command=who.command)
    try:
        clients.warm_up()
        cpu_s, forward = processes.cpu_s(served.pid), Forward(served) if case.rows >= ROWS_OF_THREADS else None
        shares = clients.shares()
        cpu_s = processes.cpu_s(served.pid) - cpu_s
        own_s = cpu_s - forward.cpu_s() if forward else None
    finally:
        clients.close()
    found = outcome(case, shares, cpu_s, None)
    if found.errors:
        raise LoadError(f"steps failed: {found.errors}")
    if not processes.is_alive(served.pid):
        raise ServerError("its server died")
    own_us = None if own_s is None else 1e6 * own_s / sum(share.steps for share in shares)
    return Figures(found.steps_per_s, found.p50_ms, found.p99_ms, found.server_us, found.client_us, own_us)


class Forward:
    """What tenuto's forward passes cost from now on: the CPU of the threads that compute, by the share of the station
    run in their time. Not the station's time itself, which has in it whatever else the machine did meanwhile.

    Of batches that are large enough to go to these threads.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._before = self._read()

    def cpu_s(self) -> float:
        """CPU seconds so far."""
        now_s, *stations = (after - before for after, before in zip(self._read(), self._before, strict=True))
        gather, run, scatter = stations
        return now_s * run / max(gather + run + scatter, 1e-9)

    def _read(self) -> list[float]:
        assert self._served.pid is not None
        stations = [
            self._served.metric("tenuto_station_seconds_sum", f'station="{station}"')
            for station in ("gather", "run", "scatter")
        ]
        return [processes.threads_cpu_s(self._served.pid, ("engine", "compute")), *stations]


def forward_alone(repository: Path, policy_name: str, rows: int) -> Figures:
    """Step the policy by itself, as its training code would."""
    policy = checkpoint.read(repository / policy_name / "1").policy.eval().requires_grad_(False)
    state, observations = policy.initial_state(rows), torch.zeros(rows, *(OBSERVATIONS.shape))
    took_s: list[float] = []
    with torch.inference_mode():
        for _ in range(5):
            _, state = policy.step(observations, state)
        end_s = time.perf_counter() + FORWARD_S
        while (began_s := time.perf_counter()) < end_s:
            _, state = policy.step(observations, state)
            took_s.append(time.perf_counter() - began_s)
    p50, p99 = np.percentile(took_s, [50, 99])
    return Figures(rows * len(took_s) / sum(took_s), 1e3 * float(p50), 1e3 * float(p99), None, None)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, default=Path(".venv-peers"), help="where make bench-peers installs")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="(default: all)")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 16, 64, 256], help="of one client process")
    parser.add_argument("--processes", type=int, default=16, help="client processes with one session each; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each turn")
    parser.add_argument("--json", type=Path, help="write all turns there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
