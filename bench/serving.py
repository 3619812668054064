"""Measures the server over a socket beside two floors of the same run, and prints one table.

Floors: an echo (grpc.aio answering the same bytes at once, on the same machine, driven by the same client: what gRPC in
Python costs by itself) and the bare forward pass (``Policy.step`` in this process: what the model costs by itself).

    python bench/serving.py [--memory dnc|frameconv] [--seconds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from gymnasium import spaces
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tenuto_models import Policy, PolicyConfig, TrainingProgress, checkpoint
from tenuto_proto import ObservationCodec, space_to_wire
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc

OBSERVATIONS, ACTIONS = spaces.Box(-1, 1, (32,)), spaces.Discrete(8)
CODEC = ObservationCodec(space_to_wire(OBSERVATIONS))
CASES = [("unary", 1), ("unary", 16), ("unary", 64), ("stream", 1), ("stream", 16), ("batch", 64), ("batch", 256)]
ECHO = """
import asyncio, sys, grpc
from tenuto_proto.v1 import policy_pb2 as pb, policy_pb2_grpc as rpc
tensor = pb.Tensor(dtype=pb.DATA_TYPE_INT64, data=bytes(8))
class Echo(rpc.PolicyServiceServicer):
    async def Step(self, request, context):
        return pb.StepResponse(step_index=request.step_index, version=1, action=tensor)
    async def StepBatch(self, request, context):
        n = len(request.session_ids)
        return pb.StepBatchResponse(versions=[1] * n, actions=pb.Tensor(dtype=8, shape=[n], data=bytes(8 * n)))
    async def StepStream(self, requests, context):
        async for request in requests:
            yield await self.StepBatch(request, context)
async def main():
    server = grpc.aio.server()
    rpc.add_PolicyServiceServicer_to_server(Echo(), server)
    print("listening on :%d, metrics on port 0" % server.add_insecure_port("127.0.0.1:0"), file=sys.stderr, flush=True)
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""


class Process:
    """A server process and how much CPU it has used."""

    def __init__(self, *command: str) -> None:
        self.popen = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
        assert self.popen.stderr is not None
        line = next(line for line in self.popen.stderr if "listening" in line)
        ports = re.search(r"listening on .*?:(\d+), metrics on port (\d+)", line)
        assert ports is not None, line
        self.port, self.metrics_port = int(ports[1]), int(ports[2])

    def cpu_s(self) -> float:
        """CPU seconds used so far, user and system."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _drive(clients: list[Callable[[], Awaitable[int]]], seconds: float) -> tuple[float, list[float]]:
    """Run closed loops for a while: (session steps per second, latencies of the calls in seconds)."""
    latencies: list[float] = []
    total, end = 0, time.perf_counter() + seconds

    async def loop(call: Callable[[], Awaitable[int]]) -> int:
        done = 0
        while (began := time.perf_counter()) < end:
            done += await call()
            latencies.append(time.perf_counter() - began)
        return done

    began = time.perf_counter()
    total = sum(await asyncio.gather(*(loop(c) for c in clients)))
    return total / (time.perf_counter() - began), latencies


def _unary(stub: Any, session_id: int) -> Callable[[], Awaitable[int]]:
    request = pb.StepRequest(session_id=session_id, observation=CODEC.pack(np.zeros(32)))

    async def call() -> int:
        await stub.Step(request)
        request.step_index += 1
        return 1

    return call


def _batch(stub: Any, session_ids: list[int], stream: bool) -> Callable[[], Awaitable[int]]:
    n, index = len(session_ids), 0
    observations = CODEC.pack(np.zeros((n, 32)), n)
    opened = stub.StepStream() if stream else None

    async def call() -> int:
        nonlocal index
        request = pb.StepBatchRequest(session_ids=session_ids, step_indices=[index] * n, observations=observations)
        index += 1
        if opened is None:
            response = await stub.StepBatch(request)
        else:
            await opened.write(request)
            response = await opened.read()
        assert not response.errors, response.errors[0]
        return n

    return call


async def measure(port: int, mode: str, sessions: int, seconds: float, real: bool) -> tuple[float, list[float]]:
    """Open the sessions and drive them."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        ids = list(range(1, sessions + 1))
        if real:
            ids = [(await stub.OpenSession(pb.OpenSessionRequest())).session_id for _ in ids]
        if mode == "batch":
            clients = [_batch(stub, ids, stream=True)]
        elif mode == "stream":
            clients = [_batch(stub, [i], stream=True) for i in ids]
        else:
            clients = [_unary(stub, i) for i in ids]
        result = await _drive(clients, seconds)
        if real:
            for i in ids:
                await stub.CloseSession(pb.CloseSessionRequest(session_id=i))
        return result


def forward_floor(policy: Policy, rows: int, seconds: float) -> float:
    """Steps per second of the bare forward pass."""
    state, observation = policy.initial_state(rows), torch.zeros(rows, 32)
    with torch.inference_mode():
        for _ in range(5):
            _, state = policy.step(observation, state)
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            _, state = policy.step(observation, state)
            steps += rows
        return steps / (time.perf_counter() - began)


def main() -> None:
    """Run every case against the server and the echo, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=["dnc", "frameconv"], default="dnc")
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = Policy(OBSERVATIONS, ACTIONS, PolicyConfig.for_memory(arguments.memory)).eval()
    console = Console(width=120)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    table = Table(title=f"{arguments.memory}, {os.cpu_count()} CPUs ({platform.machine()}), commit {commit or '?'}")
    for column in (
        "rpc",
        "sessions",
        "steps/s",
        "p50 ms",
        "p99 ms",
        "batch",
        "server µs/step",
        "of echo",
        "of forward",
    ):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write(Path(folder), "policy", policy, TrainingProgress())
        server = Process("-m", "tenuto_server.main", "--repository", folder, "--port", "0", "--metrics-port", "0")
        echo = Process("-c", ECHO)
        try:
            wait_until_ready(server)
            for mode, sessions in track(CASES, "measuring", console=console, transient=True):
                before, batches = server.cpu_s(), _metric(server, "tenuto_batch_rows_count")
                rows_before = _metric(server, "tenuto_batch_rows_sum")
                rate, latencies = asyncio.run(measure(server.port, mode, sessions, arguments.seconds, True))
                cpu_us = (server.cpu_s() - before) / (rate * arguments.seconds) * 1e6
                batches = _metric(server, "tenuto_batch_rows_count") - batches
                batch = (_metric(server, "tenuto_batch_rows_sum") - rows_before) / max(batches, 1)
                echo_rate, _ = asyncio.run(measure(echo.port, mode, sessions, arguments.seconds, False))
                floor = forward_floor(policy, max(1, round(batch)), min(arguments.seconds, 1.0))
                p50, p99 = np.percentile(np.array(latencies) * 1e3, [50, 99])
                table.add_row(
                    mode, str(sessions), f"{rate:,.0f}", f"{p50:.2f}", f"{p99:.2f}", f"{batch:.1f}",
                    f"{cpu_us:.0f}", f"{rate / echo_rate:.2f}", f"{rate / floor:.2f}",
                )  # fmt: skip
        finally:
            for process in (server, echo):
                process.popen.kill()
                process.popen.communicate()
    console.print(table)


def metrics_text(server: Process) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as response:
        return response.read().decode()


def _metric(server: Process, name: str) -> float:
    lines = metrics_text(server).splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)


def wait_until_ready(server: Process) -> None:
    deadline = time.monotonic() + 60
    while "tenuto_newest_version{" not in metrics_text(server):
        assert time.monotonic() < deadline, "the server loaded no policy"
        time.sleep(0.1)


if __name__ == "__main__":
    main()
