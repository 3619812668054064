"""The stream under a server that answers late, out of order, or not at all: no waiter hangs, and the next step works.

The server here follows a script, so that it can misbehave on purpose.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from tenuto_client.aio_transport import AioTransport
from tenuto_client.effects import Call, Calls, Program
from tenuto_client.errors import (
    BatchError,
    ClientClosedError,
    DeadlineError,
    ServerUnavailableError,
    TenutoError,
)
from tenuto_client.transport import Transport
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1 import policy_pb2_grpc

Behaviour = Callable[[Iterator[pb.StepBatchRequest], grpc.ServicerContext], Iterator[pb.StepBatchResponse]]
PATIENCE_S = 30.0


def answer(request: pb.StepBatchRequest) -> pb.StepBatchResponse:
    return pb.StepBatchResponse(request_id=request.request_id, versions=request.step_indices)


class ScriptedService(policy_pb2_grpc.PolicyServiceServicer):
    """Each new stream behaves as the next entry of ``script`` says; after the last one, faultlessly."""

    def __init__(self) -> None:
        self.script: list[Behaviour] = []
        self.num_streams = 0

    def StepStream(self, request_iterator: Any, context: Any) -> Iterator[pb.StepBatchResponse]:
        self.num_streams += 1
        behaviour = self.script.pop(0) if self.script else in_order
        yield from behaviour(request_iterator, context)


def in_order(requests: Iterator[pb.StepBatchRequest], context: grpc.ServicerContext) -> Iterator[pb.StepBatchResponse]:
    for request in requests:
        yield answer(request)


def reversed_in_threes(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.StepBatchResponse]:
    held: list[Any] = []
    for request in requests:
        held.append(request)
        if len(held) == 3:
            yield from (answer(late) for late in reversed(held))
            held.clear()


def breaks_after_one_of_two(requests: Iterator[Any], context: Any) -> Iterator[pb.StepBatchResponse]:
    yield answer(next(requests))
    next(requests)
    context.abort(grpc.StatusCode.UNAVAILABLE, "going away")


def ends_without_an_answer(requests: Iterator[Any], context: Any) -> Iterator[pb.StepBatchResponse]:
    next(requests)
    yield from ()


def silent(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.StepBatchResponse]:
    for _ in requests:
        pass
    yield from ()


def strangers(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.StepBatchResponse]:
    for request in requests:
        yield pb.StepBatchResponse(request_id=request.request_id + 1000)
        yield answer(request)
        yield answer(request)


def refuses(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.StepBatchResponse]:
    for request in requests:
        error = pb.Error(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], reason=pb.BATCH_EMPTY, message="no rows")
        yield pb.StepBatchResponse(request_id=request.request_id, error=error)


def calls(*numbers: int, timeout_s: float = PATIENCE_S) -> Program[list[Any]]:
    """Make StepBatch calls at once; return the step index that each reply is about, or its error."""
    made = (Call("StepBatch", pb.StepBatchRequest(step_indices=[number]), timeout_s) for number in numbers)
    answers = yield Calls(tuple(made))
    return [a if isinstance(a, TenutoError) else a.versions[0] for a in answers]


class Client:
    """The sync and the async transport behind one face."""

    def __init__(self, address: str, kind: str) -> None:
        self.is_async = kind == "async"
        self.transport: Any = (AioTransport if self.is_async else Transport)(address, stream=True)

    async def make(self, *numbers: int, timeout_s: float = PATIENCE_S) -> list[Any]:
        if self.is_async:
            return await self.transport.run(calls(*numbers, timeout_s=timeout_s))
        return await asyncio.to_thread(self.transport.run, calls(*numbers, timeout_s=timeout_s))

    async def close(self) -> None:
        if self.is_async:
            await self.transport.close()
        else:
            self.transport.close()


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
def address(service: ScriptedService) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(8))
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait(PATIENCE_S)


@pytest.fixture(params=["sync", "async"])
async def client(request: pytest.FixtureRequest, address: str) -> AsyncIterator[Client]:
    client = Client(address, request.param)
    yield client
    await client.close()


async def test_answers_find_their_requests_in_any_order(client: Client, service: ScriptedService) -> None:
    service.script = [reversed_in_threes]
    assert await client.make(5, 6, 7) == [5, 6, 7]
    assert await client.make(8, 9, 10, 11, 12, 13) == [8, 9, 10, 11, 12, 13]
    assert service.num_streams == 1


async def test_a_broken_stream_fails_its_waiters_and_the_next_call_reconnects(
    client: Client, service: ScriptedService
) -> None:
    service.script = [breaks_after_one_of_two]
    first, second = await client.make(1, 2)
    assert first == 1 or isinstance(first, ServerUnavailableError)
    assert isinstance(second, ServerUnavailableError) and second.code is grpc.StatusCode.UNAVAILABLE
    assert await client.make(3, 4) == [3, 4]
    assert service.num_streams == 2


async def test_a_stream_that_ends_early_fails_its_waiters(client: Client, service: ScriptedService) -> None:
    service.script = [ends_without_an_answer]
    [error] = await client.make(1)
    assert isinstance(error, ServerUnavailableError) and error.code is grpc.StatusCode.UNAVAILABLE
    assert await client.make(2) == [2]


async def test_a_silent_stream_is_replaced_at_the_deadline(client: Client, service: ScriptedService) -> None:
    service.script = [silent]
    errors = await client.make(1, 2, timeout_s=0.2)
    assert any(isinstance(error, DeadlineError) for error in errors)
    assert all(isinstance(error, (DeadlineError, ServerUnavailableError)) for error in errors)
    assert await client.make(3) == [3]
    assert service.num_streams == 2


async def test_answers_that_nobody_waits_for_are_ignored(client: Client, service: ScriptedService) -> None:
    service.script = [strangers]
    assert await client.make(1, 2) == [1, 2]
    assert await client.make(3) == [3]


async def test_a_refused_request_leaves_the_stream_up(client: Client, service: ScriptedService) -> None:
    service.script = [refuses]
    errors = await client.make(1, 2)
    assert [type(error) for error in errors] == [BatchError, BatchError] and errors[0].reason == "BATCH_EMPTY"
    assert service.num_streams == 1


async def test_closing_answers_whoever_waits(client: Client, service: ScriptedService) -> None:
    arrived = threading.Event()

    def says_when(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.StepBatchResponse]:
        for _ in requests:
            arrived.set()
        yield from ()

    service.script = [says_when]
    waiting = asyncio.create_task(client.make(1))
    assert await asyncio.to_thread(arrived.wait, PATIENCE_S)
    await client.close()
    [outcome] = await asyncio.gather(waiting, return_exceptions=True)
    failure = outcome[0] if isinstance(outcome, list) else outcome
    assert isinstance(failure, (ClientClosedError, ServerUnavailableError))
    with pytest.raises(ClientClosedError):
        await client.make(2)


async def test_a_cancelled_waiter_harms_no_other(address: str, service: ScriptedService) -> None:
    arrived = threading.Event()

    def first_one_late(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[pb.StepBatchResponse]:
        late = next(requests)
        arrived.set()
        for request in requests:
            yield answer(late)
            yield answer(request)

    service.script = [first_one_late]
    client = Client(address, "async")
    cancelled = asyncio.create_task(client.make(1))
    assert await asyncio.to_thread(arrived.wait, PATIENCE_S)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert await client.make(2, 3) == [2, 3]
    assert service.num_streams == 1
    await client.close()


async def test_many_requests_share_one_stream(client: Client, service: ScriptedService) -> None:
    assert await client.make(*range(200)) == list(range(200))
    assert service.num_streams == 1
