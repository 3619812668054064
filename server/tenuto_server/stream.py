"""One StepStream: reads messages while it has room for them, and writes answers as they get ready."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc

from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_server.calls import Answer, StepCall
from tenuto_server.errors import Refusal
from tenuto_server.metrics import Metrics

log = logging.getLogger(__name__)
MAX_STREAM_REQUESTS = 32
"""Requests of one stream that are under way at once; the server reads no further until one is answered."""
RPC = "StepStream"
_EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]


class StepStream:
    """Owned by the event loop, and by the one call that :meth:`run` serves.

    A request holds its room until its answer is on the wire, so a client that does not read is not read from.
    """

    def __init__(
        self,
        context: Any,
        begin: Callable[[pb.StepBatchRequest, Callable[[Answer | Exception], None]], StepCall],
        leave: Callable[[StepCall], None],
        metrics: Metrics,
    ) -> None:
        """``begin(request, answer)`` takes a request, ``leave(call)`` gives it up."""
        self._context, self._begin, self._leave, self._metrics = context, begin, leave, metrics
        self._calls: dict[int, StepCall] = {}
        """Under way, by their number in the stream."""
        self._answers: deque[pb.StepBatchResponse] = deque()
        self._num_read = self._num_written = 0
        self._is_read = False
        """Whether no further request will come."""
        self._read_error: Exception | None = None
        self._to_write, self._room = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Answer everything; what is under way is given up when the client vanishes."""
        reading = asyncio.create_task(self._read())
        try:
            while self._answers or not self._is_read or self._num_written < self._num_read:
                if not self._answers:
                    self._to_write.clear()
                    await self._to_write.wait()
                    continue
                await self._context.write(self._answers.popleft())
                self._num_written += 1
                self._room.set()
            if self._read_error is not None:
                self._metrics.count_request(RPC, "INVALID_ARGUMENT")
                message = f"a message of the stream cannot be read: {type(self._read_error).__name__}"
                await self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        finally:
            reading.cancel()
            for call in self._calls.values():
                self._leave(call)
                self._metrics.count_request(RPC, "CANCELLED")

    async def _read(self) -> None:
        try:
            while (request := await self._context.read()) is not _EOF:
                number = self._num_read
                self._num_read += 1
                answer = partial(self._answer, number, request.request_id)
                try:
                    call = self._begin(request, answer)
                except Exception as error:  # noqa: BLE001 (whatever it was, the client must hear of it)
                    answer(error)
                else:
                    if not call.is_over:
                        self._calls[number] = call
                if self._answers:
                    # Its answer leaves before the next request is asked for.
                    await asyncio.sleep(0)
                while self._num_read - self._num_written >= MAX_STREAM_REQUESTS:
                    self._room.clear()
                    await self._room.wait()
        except Exception as error:  # noqa: BLE001 (a message that is none; whatever it was, the client must hear of it)
            self._read_error = error
        self._is_read = True
        self._to_write.set()

    def _answer(self, number: int, request_id: int, outcome: Answer | Exception) -> None:
        self._calls.pop(number, None)
        if isinstance(outcome, Exception):
            self._answers.append(self._failure(request_id, outcome))
        else:
            assert isinstance(outcome, pb.StepBatchResponse)
            self._metrics.count_request(RPC, "OK")
            self._answers.append(outcome)
        self._to_write.set()

    def _failure(self, request_id: int, error: Exception) -> pb.StepBatchResponse:
        """The answer to a request that failed as a whole."""
        if isinstance(error, Refusal):
            self._metrics.count_request(RPC, error.code.name)
            self._metrics.refusals.labels(error.reason_name).inc(error.num_rows)
            return pb.StepBatchResponse(request_id=request_id, error=error.to_wire())
        log.error("a StepStream request failed", exc_info=error)
        self._metrics.count_request(RPC, "INTERNAL")
        failure = pb.Error(code=grpc.StatusCode.INTERNAL.value[0], message="internal error")
        return pb.StepBatchResponse(request_id=request_id, error=failure)
