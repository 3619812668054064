"""Many StepBatch requests over one StepStream, answered in any order; grpc.aio. Behaves as stream.py does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

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


class AioStepStream:
    """Hands out one connection after another. Owned by one event loop."""

    def __init__(self, method: Callable[[], Any]) -> None:
        """Open nothing yet. ``method``: the stub's StepStream."""
        self._method = method
        self._connection: _Connection | None = None
        self._closed = False

    async def send(self, request: pb.StepBatchRequest, timeout_s: float) -> pb.StepBatchResponse:
        """Send a request, whose request_id this overwrites, and wait for its answer.

        Raises grpc.RpcError or TenutoError; drops the connection where the time is up.
        """
        if self._closed:
            raise ClientClosedError("the policy was closed")
        if self._connection is None or self._connection.is_broken:
            self._connection = _Connection(self._method())
        connection = self._connection
        try:
            return await asyncio.wait_for(connection.exchange(request), timeout_s)
        except asyncio.TimeoutError:
            connection.drop()
            raise stream_silent(timeout_s) from None

    async def close(self) -> None:
        """End the connection; waiters get an error."""
        self._closed = True
        if self._connection is not None:
            self._connection.drop()
            await self._connection.ended()


class _Connection:
    """One stream with the task that reads it. Answers every waiter, whatever happens."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._waiters: dict[int, asyncio.Future[pb.StepBatchResponse]] = {}
        self._last_id = 0
        self._writing = asyncio.Lock()
        self.is_broken = False
        self._reader = asyncio.create_task(self._read(), name="tenuto-stream")

    async def exchange(self, request: pb.StepBatchRequest) -> pb.StepBatchResponse:
        """Write a request and wait for its answer."""
        if self.is_broken:
            raise stream_ended()
        self._last_id += 1
        request_id = request.request_id = self._last_id
        reply: asyncio.Future[pb.StepBatchResponse] = asyncio.get_running_loop().create_future()
        self._waiters[request_id] = reply
        try:
            async with self._writing:
                await self._call.write(request)
            return await reply
        except asyncio.InvalidStateError as error:
            # What gRPC raises for a write to a stream that has ended.
            raise stream_ended() from error
        finally:
            self._waiters.pop(request_id, None)
            if reply.done() and not reply.cancelled():
                # Marks the error as seen where the write failed first.
                reply.exception()

    def drop(self) -> None:
        """Cancel the stream; the reader then answers the waiters."""
        self.is_broken = True
        self._call.cancel()

    async def ended(self) -> None:
        """Wait until every waiter is answered."""
        await asyncio.wait({self._reader})

    async def _read(self) -> None:
        error: Exception = stream_ended()
        try:
            while (response := await self._call.read()) is not _EOF:
                reply = self._waiters.pop(response.request_id, None)
                if reply is not None and not reply.done():
                    reply.set_result(response)
        except grpc.RpcError as rpc_error:
            error = rpc_error
        except asyncio.CancelledError:
            # The stream was dropped.
            pass
        finally:
            self.is_broken = True
            waiters, self._waiters = list(self._waiters.values()), {}
            for reply in waiters:
                if not reply.done():
                    reply.set_exception(error)
