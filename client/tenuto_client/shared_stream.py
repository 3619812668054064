"""The steps of many sessions over one StepStream: those that are ready together travel in one message, both ways.

Nothing waits for company: a message takes in what is ready until the stream can send it, which is at the end of the
turn of the event loop, or when the message before it is written.
"""

from __future__ import annotations

import asyncio
from functools import partial
from math import inf
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import grpc
import grpc.aio

from tenuto_client.aio_stream import AioStepStream, Connection, open_channel
from tenuto_client.errors import TenutoError, error_from_rpc
from tenuto_client.step import Answer, Step, StepForm
from tenuto_client.stream import stream_silent
from tenuto_client.transport import Metadata
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1.policy_pb2_grpc import PolicyServiceStub

_Key = tuple[str, grpc.ChannelCredentials | None, Metadata]
"""Address, credentials, and what says who calls."""
_Row = tuple[Step, asyncio.Future[Answer], float, float]
"""A step, its waiter, its timeout in seconds, and until when it waits, by the loop's clock."""


class SharedStream:
    """One connection of an event loop to an address, and its stream. Lives as long as somebody uses it."""

    _of_loop: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Key, SharedStream]]] = WeakKeyDictionary()

    def __init__(self, key: _Key, channel: grpc.aio.Channel) -> None:
        """Use :meth:`acquire`."""
        self._key, self._users = key, 0
        self.channel, self.stub = channel, PolicyServiceStub(channel)
        self._stream = AioStepStream(partial(self.stub.StepStream, metadata=key[2]))
        self._loop = asyncio.get_running_loop()
        self._filling: dict[Any, _Message] = {}
        """By the key of its steps' form: a message that still takes rows in."""

    @classmethod
    def acquire(
        cls, address: str, credentials: grpc.ChannelCredentials | None, authorization: Metadata = ()
    ) -> SharedStream:
        """Return the running loop's stream to an address, a new one where there is none. To be released once."""
        of_key = cls._of_loop.setdefault(asyncio.get_running_loop(), {})
        key = (address, credentials, authorization)
        if key not in of_key:
            of_key[key] = cls(key, open_channel(address, credentials))
        of_key[key]._users += 1
        return of_key[key]

    async def release(self) -> None:
        """Leave; the last one closes the connection."""
        self._users -= 1
        if not self._users:
            self._of_loop[self._loop].pop(self._key)
            await self._stream.close()
            await self.channel.close()

    def send(self, step: Step, timeout_s: float) -> asyncio.Future[Answer]:
        """Send a step as a row of a message; the future gets what becomes of it. Raises ClientClosedError."""
        message = self._filling.get(step.form.key)
        if message is None or len(message.rows) >= message.max_rows:
            message = _Message(step.form, self._filling)
            message.connection = self._stream.post(message)
            self._filling[step.form.key] = message
        reply: asyncio.Future[Answer] = self._loop.create_future()
        end_s = self._loop.time() + timeout_s
        message.rows.append((step, reply, timeout_s, end_s))
        message.connection.watch(end_s)
        return reply


class _Message:
    """Steps of one form that travel together."""

    connection: Connection
    """Where it was posted."""

    def __init__(self, form: StepForm, filling: dict[Any, _Message]) -> None:
        """Be empty. ``filling``: where it stands while it takes rows in."""
        self._form, self._filling = form, filling
        self.rows: list[_Row] = []
        self.max_rows = max(form.served.max_rows, 1)

    def request(self) -> pb.StepBatchRequest:
        """Take no more rows in and return them as one request."""
        self._leave()
        return self._form.join([row[0] for row in self.rows], max(row[2] for row in self.rows))

    def settle(self, outcome: pb.StepBatchResponse | Exception) -> None:
        """Give each waiter that is still there its part of the answer, or an error of its own."""
        self._leave()
        if isinstance(outcome, pb.StepBatchResponse):
            answers = self._form.cut([row[0] for row in self.rows], outcome)
        else:
            answers = [_copied(outcome, row[0]) for row in self.rows]
        for (_, reply, _, _), answer in zip(self.rows, answers, strict=True):
            if not reply.done():
                reply.set_result(answer)

    def expire(self, now_s: float) -> float:
        """See aio_stream.Message."""
        next_s = inf
        for _, reply, timeout_s, end_s in self.rows:
            if now_s < end_s:
                next_s = min(next_s, end_s)
            elif not reply.done():
                reply.set_result(stream_silent(timeout_s))
        return next_s

    def _leave(self) -> None:
        if self._filling.get(self._form.key) is self:
            del self._filling[self._form.key]


def _copied(error: Exception, step: Step) -> TenutoError:
    """Return what a step's waiter is told of an error that it has in common with others."""
    if isinstance(error, TenutoError):
        return type(error)(*error.args, code=error.code)
    return error_from_rpc(error, step.form.server_epoch)
