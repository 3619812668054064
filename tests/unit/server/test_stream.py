"""One StepStream without a network: what is answered, in which order, and what is left when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc.aio
import torch

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.calls import StepCall
from tenuto_server.metrics import Metrics
from tenuto_server.stream import StepStream

EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]


class Client:
    """The other end of a stream: sends its messages one after the other, and notes what happens when."""

    def __init__(self, num_messages: int) -> None:
        self.to_send = [pb.StepBatchRequest(request_id=number) for number in range(num_messages)]
        self.seen: list[str] = []
        self.answers: list[pb.StepBatchResponse] = []

    async def read(self) -> Any:
        self.seen.append("read")
        return self.to_send.pop(0) if self.to_send else EOF

    async def write(self, answer: pb.StepBatchResponse) -> None:
        self.seen.append("write")
        self.answers.append(answer)


def call_for(request: pb.StepBatchRequest, answer: Callable[[Any], None]) -> StepCall:
    return StepCall("StepStream", request, 0.0, 1e9, answer)


async def serve(client: Client, begin: Callable[[Any, Callable[[Any], None]], StepCall]) -> list[StepCall]:
    """Serve the client to its end; returns the calls that were given up."""
    left: list[StepCall] = []
    await asyncio.wait_for(StepStream(client, begin, left.append, Metrics(torch.device("cpu"))).run(), 10)
    return left


async def test_what_is_answered_at_once_leaves_before_the_next_read_and_is_never_given_up() -> None:
    def begin(request: pb.StepBatchRequest, answer: Callable[[Any], None]) -> StepCall:
        call = call_for(request, answer)
        call.finish(pb.StepBatchResponse(request_id=request.request_id))
        return call

    client = Client(50)
    assert await serve(client, begin) == []
    assert [answer.request_id for answer in client.answers] == list(range(50))
    assert client.seen == ["read", "write"] * 50 + ["read"]


async def test_answers_go_out_as_they_get_ready() -> None:
    calls: list[StepCall] = []

    def begin(request: pb.StepBatchRequest, answer: Callable[[Any], None]) -> StepCall:
        calls.append(call_for(request, answer))
        if len(calls) == 3:
            for number in (2, 0, 1):
                calls[number].finish(pb.StepBatchResponse(request_id=number))
        return calls[-1]

    client = Client(3)
    assert await serve(client, begin) == []
    assert [answer.request_id for answer in client.answers] == [2, 0, 1]


async def test_a_request_that_cannot_be_begun_is_answered_and_the_others_go_on() -> None:
    def begin(request: pb.StepBatchRequest, answer: Callable[[Any], None]) -> StepCall:
        if request.request_id == 1:
            raise RuntimeError("a fault of ours")
        call = call_for(request, answer)
        call.finish(pb.StepBatchResponse(request_id=request.request_id))
        return call

    client = Client(3)
    assert await serve(client, begin) == []
    assert [(a.request_id, a.error.code) for a in client.answers] == [
        (0, 0),
        (1, grpc.StatusCode.INTERNAL.value[0]),
        (2, 0),
    ]
    assert "fault of ours" not in client.answers[1].error.message
