"""Many StepBatch requests over one StepStream, answered in any order; grpc.aio. Behaves as stream.py does."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any, Protocol

import grpc
import grpc.aio

from tenuto_client.errors import ClientClosedError
from tenuto_client.stream import stream_ended, stream_silent
from tenuto_client.transport import CHANNEL_OPTIONS
from tenuto_proto.v1 import policy_pb2 as pb

# Missing from the stubs.
_EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]


def open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """Open a channel of the running loop; it connects with its first call."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, CHANNEL_OPTIONS)


class Message(Protocol):
    """A request on its way. Times are those of the loop."""

    def request(self) -> pb.StepBatchRequest:
        """Return what to send; called when the stream can take it, once."""
        ...

    def settle(self, outcome: pb.StepBatchResponse | Exception) -> None:
        """Take the answer, or a grpc.RpcError or TenutoError in its place; called once."""
        ...

    def expire(self, now_s: float) -> float:
        """Give up whoever has waited too long; return until when the next one waits, infinity where nobody does."""
        ...


class AioStepStream:
    """Hands out one connection after another. Owned by the running event loop."""

    def __init__(self, method: Callable[[], Any]) -> None:
        """Open nothing yet. ``method``: the stub's StepStream."""
        self._method = method
        self._connection: Connection | None = None
        self._closed = False

    def post(self, message: Message) -> Connection:
        """Send a message, as soon as those before it are sent. Raises ClientClosedError."""
        connection = self._connection
        if connection is None or connection.is_broken:
            if self._closed:
                raise ClientClosedError("the policy was closed")
            connection = self._connection = Connection(self._method())
        connection.post(message)
        return connection

    async def send(self, request: pb.StepBatchRequest, timeout_s: float) -> pb.StepBatchResponse:
        """Send a request, whose request_id this overwrites, and wait for its answer.

        Raises grpc.RpcError or TenutoError; drops the connection where the time is up.
        """
        message = _Request(request, timeout_s)
        self.post(message).watch(message.end_s)
        return await message.reply

    async def close(self) -> None:
        """End the connection; waiters get an error."""
        self._closed = True
        if self._connection is not None:
            self._connection.drop()
            await self._connection.ended()


class _Request:
    """A message with one waiter."""

    def __init__(self, request: pb.StepBatchRequest, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._request, self._timeout_s = request, timeout_s
        self.end_s = loop.time() + timeout_s
        self.reply: asyncio.Future[pb.StepBatchResponse] = loop.create_future()

    def request(self) -> pb.StepBatchRequest:
        """See Message."""
        return self._request

    def settle(self, outcome: pb.StepBatchResponse | Exception) -> None:
        """See Message."""
        if self.reply.done():
            return
        if isinstance(outcome, Exception):
            self.reply.set_exception(outcome)
        else:
            self.reply.set_result(outcome)

    def expire(self, now_s: float) -> float:
        """See Message."""
        if now_s < self.end_s:
            return self.end_s
        self.settle(stream_silent(self._timeout_s))
        return inf


class Connection:
    """One stream with the tasks that write and read it. Settles every message, whatever happens."""

    def __init__(self, call: Any) -> None:
        self._call, self._loop = call, asyncio.get_running_loop()
        self._under_way: dict[int, Message] = {}
        """By request id; written, or in the outbox."""
        self._outbox: deque[tuple[int, Message]] = deque()
        self._last_id = 0
        self._idle: asyncio.Future[None] | None = None
        """Where the writer waits for the next message."""
        self._sweep_s, self._sweeper = inf, None
        """When whoever waits too long is given up next, and the timer of it."""
        self.is_broken = False
        self._writer = asyncio.create_task(self._write(), name="tenuto-stream-writer")
        self._reader = asyncio.create_task(self._read(), name="tenuto-stream-reader")

    def post(self, message: Message) -> None:
        """Queue a message."""
        self._last_id += 1
        self._under_way[self._last_id] = message
        self._outbox.append((self._last_id, message))
        if self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    def watch(self, end_s: float) -> None:
        """See to it that messages under way are asked to expire at this time. One timer serves all of them."""
        if end_s < self._sweep_s:
            if self._sweeper is not None:
                self._sweeper.cancel()
            self._sweep_s, self._sweeper = end_s, self._loop.call_at(end_s, self._sweep)

    def drop(self) -> None:
        """Cancel the stream; the reader then settles what is under way."""
        self.is_broken = True
        self._call.cancel()

    async def ended(self) -> None:
        """Wait until everything is settled."""
        await asyncio.wait({self._reader, self._writer})

    def _sweep(self) -> None:
        self._sweep_s, self._sweeper = inf, None
        now_s = self._loop.time()
        ends = [message.expire(now_s) for message in self._under_way.values()]
        if inf in ends:
            self.drop()
        elif ends:
            self.watch(min(ends))

    async def _write(self) -> None:
        try:
            while True:
                while self._outbox:
                    request_id, message = self._outbox.popleft()
                    request = message.request()
                    request.request_id = request_id
                    await self._call.write(request)
                self._idle = self._loop.create_future()
                await self._idle
        except (grpc.RpcError, asyncio.InvalidStateError):
            # What gRPC raises for a write to a stream that has ended; the reader hears of it too.
            pass
        finally:
            self.drop()

    async def _read(self) -> None:
        error: Exception = stream_ended()
        try:
            while (response := await self._call.read()) is not _EOF:
                message = self._under_way.pop(response.request_id, None)
                if message is not None:
                    message.settle(response)
        except grpc.RpcError as rpc_error:
            error = rpc_error
        except asyncio.CancelledError:
            # The stream was dropped.
            pass
        finally:
            self.is_broken = True
            self._writer.cancel()
            if self._sweeper is not None:
                self._sweeper.cancel()
            under_way, self._under_way = list(self._under_way.values()), {}
            for message in under_way:
                message.settle(error)
