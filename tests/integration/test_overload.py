"""More than the device can do: what is refused, what it costs, who goes on, and what is left afterwards."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from serving import ServerProcess, hanging_while_exists, publish, small_policy, wait_until
from tenuto_client import CapacityError, OverloadedError, RemotePolicy
from tenuto_client.errors import error_from_rpc
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1.policy_pb2_grpc import PolicyServiceStub
from tenuto_server import tokens
from tenuto_server.principals import Principal
from wire import WireSession, batch, observations, refused

BATCH_S, MAX_BATCH, DELAY_MS = 0.02, 8, 200
SLOW = f"""
import math, time
from tenuto_server.engine import Engine
from tenuto_server.host_step import HostStep
HostStep.expected_s = lambda self, num_rows: math.inf
def slow(self, *arguments, unharmed=Engine.run):
    time.sleep({BATCH_S})
    return unharmed(self, *arguments)
Engine.run = slow
"""
"""A device that takes 20 ms for a batch."""
PRINCIPALS = (
    Principal("greedy"),
    Principal("modest"),
    Principal("few", max_sessions=2),
    Principal("limited", max_steps_per_s=20),
)
COUNTED = """
import gc
from prometheus_client import Gauge
from tenuto_server.metrics import Metrics
def count(name):
    gc.collect()
    return sum(type(thing).__name__ == name for thing in gc.get_objects())
def build(self, *arguments, unharmed=Metrics.__init__):
    unharmed(self, *arguments)
    for name in ("Ticket", "StepCall", "StepStream"):
        Gauge(f"objects_{name}", "Alive.", registry=self.registry).set_function(lambda name=name: count(name))
Metrics.__init__ = build
"""
"""Metrics that count what a request leaves behind."""


class Crowd(ServerProcess):
    """A slow device, callers with tokens, and a metric of what is alive."""

    def __init__(self, folder: Path) -> None:
        publish(folder / "repository", small_policy("frameconv"))
        self.tokens = {p.name: tokens.add(folder / "tokens.json", p) for p in PRINCIPALS}
        flags = ("--max-batch", str(MAX_BATCH), "--max-queue-delay-ms", str(DELAY_MS), "--capacity", "4096",
                 "--tokens", str(folder / "tokens.json"))  # fmt: skip
        super().__init__(folder / "repository", *flags, fault=SLOW + COUNTED)

    def named(self, name: str) -> tuple[tuple[str, str], ...]:
        """The metadata of a caller."""
        return (("authorization", f"Bearer {self.tokens[name]}"),)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    with Crowd(tmp_path_factory.mktemp("overload")) as running:
        yield running


def opened(server: Crowd, name: str) -> WireSession:
    """A session of a caller."""
    session = WireSession.__new__(WireSession)
    session.id = server.stub.OpenSession(pb.OpenSessionRequest(), metadata=server.named(name)).session_id
    session.index = 0
    return session


class Greedy:
    """A caller with 32 streams, four messages of eight rows under way on each, that hardly waits when it is refused."""

    NUM_STREAMS, PER_STREAM, PAUSE_S = 32, 4, 0.05

    def __init__(self, server: Crowd) -> None:
        self._address, self._metadata = server.address, server.named("greedy")
        self.num_refused = self.num_good = 0
        self.hints_ms: list[int] = []
        self.queue_us: list[int] = []
        self.is_pressing = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Greedy:
        self._thread.start()
        assert self.is_pressing.wait(30), "the greedy caller was never refused"
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub: Any = PolicyServiceStub(channel)
            streams = [self._stream(stub) for _ in range(self.NUM_STREAMS)]
            tasks = [asyncio.create_task(stream) for stream in streams]
            await asyncio.to_thread(self._stop.wait)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stream(self, stub: Any) -> None:
        call = stub.StepStream(metadata=self._metadata)
        [observation] = observations(1)
        requests: list[pb.StepBatchRequest] = []
        for number in range(self.PER_STREAM):
            rows = [await self._open(stub) for _ in range(MAX_BATCH)]
            request = batch(rows, [observation] * MAX_BATCH, request_id=number)
            request.ClearField("outputs")
            requests.append(request)
        for request in requests:
            await call.write(request)
        while True:
            reply = await call.read()
            request = requests[reply.request_id]
            if reply.HasField("error"):
                self.num_refused += 1
                assert reply.error.reason == pb.QUEUE_FULL
                self.hints_ms.append(reply.error.retry_after_ms)
                self.is_pressing.set()
                await asyncio.sleep(self.PAUSE_S)
            else:
                assert not reply.errors
                self.num_good += MAX_BATCH
                self.queue_us.append(reply.timings.queue_us)
                request.step_indices[:] = [index + 1 for index in request.step_indices]
            await call.write(request)

    async def _open(self, stub: Any) -> WireSession:
        session = WireSession.__new__(WireSession)
        opened = await stub.OpenSession(pb.OpenSessionRequest(), metadata=self._metadata)
        session.id, session.index = opened.session_id, 0
        return session


def test_a_greedy_caller_does_not_starve_a_modest_one(server: Crowd) -> None:
    metadata = server.named("modest")
    session = opened(server, "modest")
    waits_us: list[int] = []
    with Greedy(server) as greedy:
        first = len(greedy.queue_us)
        for observation in observations(25):
            # Never refused, though the queue is full of the other's steps.
            reply = server.stub.Step(session.request(observation), metadata=metadata, timeout=10)
            session.index += 1
            waits_us.append(reply.timings.queue_us)
        others_us = greedy.queue_us[first:]
    assert greedy.num_refused > 50 and len(others_us) > 10
    # What runs when it comes, and half of what is taken next; the other waits for all that it has sent.
    assert statistics.median(waits_us) < 2.5e6 * BATCH_S
    assert statistics.median(others_us) > 2 * statistics.median(waits_us)
    assert statistics.median(greedy.hints_ms) > 1e3 * BATCH_S


def test_an_overload_leaves_nothing_behind(server: Crowd) -> None:
    with Greedy(server) as greedy:
        wait_until(lambda: greedy.num_good > 200, "the greedy caller to be served")
        assert server.metric("tenuto_queue_parties") == 1
        assert 0 < server.metric("tenuto_queue_delay_seconds") < 5
    # Its streams are gone in the middle of their messages.
    for name in ("Ticket", "StepCall", "StepStream"):
        wait_until(lambda name=name: server.metric(f"objects_{name}") == 0, f"the last {name} to be gone")
    assert server.metric("tenuto_queued_rows") == server.metric("tenuto_queue_parties") == 0
    wait_until(lambda: server.metric('tenuto_sessions{state="stepping"}') == 0, "the last step's session to be free")


def test_the_client_keeps_to_the_rate_that_the_server_grants(server: Crowd) -> None:
    before = server.metric('tenuto_refusals_total{reason="QUOTA_EXCEEDED"}')
    num_steps, rate = 50, 20
    with RemotePolicy(server.address, token=server.tokens["limited"]) as policy:
        policy.connect()
        began_s = time.monotonic()
        for index, observation in enumerate(observations(num_steps)):
            assert policy.step(observation).step_index == index
        took_s = time.monotonic() - began_s
    # A second's steps are there at first.
    assert took_s >= (num_steps - rate) / rate - 0.1
    # One refusal a step tells when to come back: nobody knocks in vain.
    assert server.metric('tenuto_refusals_total{reason="QUOTA_EXCEEDED"}') - before <= num_steps - rate + 5


def test_a_refusal_says_when_to_try_again(server: Crowd) -> None:
    metadata = server.named("limited")
    sessions = [opened(server, "limited") for _ in range(MAX_BATCH)]
    [observation] = observations(1)
    request = batch(sessions, [observation] * MAX_BATCH)

    def spend() -> grpc.RpcError | None:
        try:
            reply = server.stub.StepBatch(request, metadata=metadata)
        except grpc.RpcError as error:
            return error
        assert not reply.errors
        request.step_indices[:] = [index + 1 for index in request.step_indices]
        return None

    error = error_from_rpc(wait_until(spend, "the quota to be used up"))
    assert isinstance(error, OverloadedError) and error.reason == "QUOTA_EXCEEDED"
    assert error.metadata == {"quota": "steps"} and error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.retry_after_s is not None and 0 < error.retry_after_s <= MAX_BATCH / 20
    threading.Event().wait(error.retry_after_s)
    assert spend() is None


def test_a_principal_holds_no_more_sessions_than_its_quota(server: Crowd) -> None:
    open_session, few = server.stub.OpenSession, server.named("few")
    ids = [open_session(pb.OpenSessionRequest(), metadata=few).session_id for _ in range(2)]
    exceeded = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", {"quota": "sessions"})
    assert refused(open_session, pb.OpenSessionRequest(), metadata=few) == exceeded
    # The same open again is no further session, and others are not concerned.
    assert open_session(pb.OpenSessionRequest(session_id=ids[0], seed=ids[0]), metadata=few).session_id == ids[0]
    open_session(pb.OpenSessionRequest(), metadata=server.named("modest"))
    server.stub.CloseSession(pb.CloseSessionRequest(session_id=ids[0]), metadata=few)
    open_session(pb.OpenSessionRequest(), metadata=few)
    assert refused(open_session, pb.OpenSessionRequest(), metadata=few) == exceeded


def test_a_server_without_a_free_slot_says_when_to_try_again(tmp_path: Path) -> None:
    publish(tmp_path, small_policy("frameconv"))
    with ServerProcess(tmp_path, "--capacity", "1") as server:
        WireSession(server, policy="")
        with pytest.raises(grpc.RpcError) as caught:
            WireSession(server, policy="")
        error = error_from_rpc(caught.value)
    assert isinstance(error, CapacityError) and error.retry_after_s == 1.0


def test_steps_whose_deadline_passed_or_whose_caller_left_cost_no_forward(tmp_path: Path) -> None:
    publish(tmp_path, small_policy("frameconv"))
    hang = tmp_path / "hang"
    hang.touch()
    with ServerProcess(tmp_path, fault=hanging_while_exists(hang)) as server:
        [observation] = observations(1)
        sessions = [WireSession(server, policy="") for _ in range(31)]
        first, *rest = [session.request(observation) for session in sessions[:21]]
        running = server.stub.Step.future(first, timeout=60)
        wait_until(lambda: server.metric("tenuto_batch_rows_count") == 1, "the device to be busy")
        late = [server.stub.Step.future(request, timeout=0.3) for request in rest[:10]]
        left = [server.stub.Step.future(request, timeout=60) for request in rest[10:]]
        many = server.stub.StepBatch.future(batch(sessions[21:], [observation] * 10, queue_timeout_ms=300), timeout=60)
        wait_until(lambda: server.metric("tenuto_queued_rows") >= 30, "all of them to wait")
        for call in left:
            call.cancel()
        for call in late:
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert {error.error.reason for error in many.result().errors} == {pb.QUEUE_TIMEOUT}
        wait_until(lambda: server.metric("tenuto_queued_rows") == 0, "the queue to be empty")
        hang.unlink()
        running.result()
        for session in sessions[1:]:
            session.step(observation)
        assert server.metric("tenuto_batch_rows_sum") == len(sessions)
