"""The steps of many sessions over one StepStream: those that are ready together travel in one message, both ways.

Nothing waits for company: what is ready in one turn of the event loop goes out at its end, in as few messages as the
server's limits allow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import grpc
import grpc.aio
import numpy as np

from tenuto_client.aio_stream import AioStepStream, open_channel
from tenuto_client.effects import Call
from tenuto_client.errors import (
    ClientClosedError,
    TenutoError,
    UnexpectedReplyError,
    error_from_message,
    error_from_rpc,
)
from tenuto_client.stream import stream_silent
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1.policy_pb2_grpc import PolicyServiceStub

_Key = tuple[str, grpc.ChannelCredentials | None]


class SharedStream:
    """One connection of an event loop to an address, and its stream. Lives as long as somebody uses it."""

    _of_loop: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Key, SharedStream]]] = WeakKeyDictionary()

    def __init__(self, key: _Key, channel: grpc.aio.Channel) -> None:
        """Use :meth:`acquire`."""
        self._key, self._users = key, 0
        self.channel, self.stub = channel, PolicyServiceStub(channel)
        self._stream = AioStepStream(self.stub.StepStream)
        self._loop = asyncio.get_running_loop()
        self._ready: list[_Row] = []
        self._messages: set[asyncio.Task[None]] = set()

    @classmethod
    def acquire(cls, address: str, credentials: grpc.ChannelCredentials | None) -> SharedStream:
        """Return the running loop's stream to an address, a new one where there is none. To be released once."""
        of_key = cls._of_loop.setdefault(asyncio.get_running_loop(), {})
        key = (address, credentials)
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

    async def step(self, call: Call) -> pb.StepResponse | TenutoError:
        """Send a Step as a row of a message and return its reply or its error."""
        row = _Row(call, self._loop.create_future())
        if not self._ready:
            self._loop.call_soon(self._send)
        self._ready.append(row)
        timer = self._loop.call_later(call.timeout_s, row.expire)
        try:
            return await row.reply
        finally:
            timer.cancel()

    def _send(self) -> None:
        """Send what is ready, the rows of one policy together."""
        ready, self._ready = self._ready, []
        groups: dict[Any, list[_Row]] = {}
        for row in ready:
            assert row.call.served is not None
            outputs = row.request.outputs
            key = (row.call.served.policy_name, outputs.value, outputs.log_prob, outputs.logits)
            groups.setdefault(key, []).append(row)
        for rows in groups.values():
            first_call = rows[0].call
            assert first_call.served is not None
            most = first_call.served.max_rows_of(first_call.request)
            for first in range(0, len(rows), most):
                message = asyncio.create_task(self._exchange(rows[first : first + most]))
                self._messages.add(message)
                message.add_done_callback(self._messages.discard)

    async def _exchange(self, rows: list[_Row]) -> None:
        try:
            response = await self._stream.send(_merged(rows), max(row.call.timeout_s for row in rows))
        except grpc.RpcError as error:
            for row in rows:
                row.settle(error_from_rpc(error, row.call.server_epoch))
        except asyncio.CancelledError:
            for row in rows:
                row.settle(ClientClosedError("the policy was closed"))
            raise
        except TenutoError as error:
            for row in rows:
                # Each waiter raises an exception of its own.
                row.settle(type(error)(*error.args, code=error.code))
        else:
            _distribute(response, rows)


class _Row:
    """A step on its way."""

    __slots__ = ("call", "reply", "request")

    def __init__(self, call: Call, reply: asyncio.Future[pb.StepResponse | TenutoError]) -> None:
        self.call, self.reply = call, reply
        self.request: Any = call.request

    def expire(self) -> None:
        """Answer that the time is up."""
        self.settle(stream_silent(self.call.timeout_s))

    def settle(self, outcome: pb.StepResponse | TenutoError) -> None:
        """Answer, unless the waiter is gone."""
        if not self.reply.done():
            self.reply.set_result(outcome)


def _merged(rows: Sequence[_Row]) -> pb.StepBatchRequest:
    """One message of the requests of one policy."""
    requests: list[pb.StepRequest] = [row.request for row in rows]
    merged = pb.StepBatchRequest(
        session_ids=[r.session_id for r in requests],
        step_indices=[r.step_index for r in requests],
        episode_starts=[r.episode_start for r in requests],
        rewards=[r.reward if r.HasField("reward") else np.nan for r in requests],
        outputs=requests[0].outputs,
        queue_timeout_ms=max(1, int(1e3 * max(row.call.timeout_s for row in rows))),
    )
    for column in zip(*(r.observation for r in requests), strict=True):
        first = column[0].tensor
        tensor = pb.Tensor(
            dtype=first.dtype, shape=[len(requests), *first.shape], data=b"".join(leaf.tensor.data for leaf in column)
        )
        merged.observations.append(pb.NamedTensor(name=column[0].name, tensor=tensor))
    return merged


def _distribute(response: pb.StepBatchResponse, rows: Sequence[_Row]) -> None:
    """Answer each row with its part of a reply."""
    if response.HasField("error"):
        for row in rows:
            row.settle(error_from_message(response.error, row.call.server_epoch))
        return
    failed = {e.row: e.error for e in response.errors}
    try:
        columns = {name: _RowsOf(getattr(response, name), len(rows)) for name in _COLUMNS if response.HasField(name)}
        versions = list(response.versions)
        if len(versions) != len(rows):
            raise UnexpectedReplyError(f"reply: got {len(versions)} versions, expected {len(rows)}")
    except UnexpectedReplyError as error:
        for row in rows:
            row.settle(UnexpectedReplyError(*error.args))
        return
    for i, row in enumerate(rows):
        if i in failed:
            row.settle(error_from_message(failed[i], row.call.server_epoch))
            continue
        reply = pb.StepResponse(
            step_index=row.request.step_index, version=versions[i], timings=response.timings,
            action=columns["actions"].tensor(i) if "actions" in columns else None,
            logits=columns["logits"].tensor(i) if "logits" in columns else None,
        )  # fmt: skip
        if "values" in columns:
            reply.value = columns["values"].number(i)
        if "log_probs" in columns:
            reply.log_prob = columns["log_probs"].number(i)
        row.settle(reply)


_COLUMNS = ("actions", "values", "log_probs", "logits")


class _RowsOf:
    """The rows of a tensor ``[n, ...]``."""

    def __init__(self, tensor: pb.Tensor, num_rows: int) -> None:
        if not tensor.shape or tensor.shape[0] != num_rows or len(tensor.data) % num_rows:
            raise UnexpectedReplyError(f"reply: got a tensor of shape {list(tensor.shape)}, expected {num_rows} rows")
        self._dtype, self._shape, self._data = tensor.dtype, tensor.shape[1:], tensor.data
        self._size = len(tensor.data) // num_rows

    def tensor(self, row: int) -> pb.Tensor:
        return pb.Tensor(
            dtype=self._dtype, shape=self._shape, data=self._data[row * self._size : (row + 1) * self._size]
        )

    def number(self, row: int) -> float:
        if self._size != 4:
            raise UnexpectedReplyError(f"reply: got {self._size} bytes for a float32, expected 4")
        return float(np.frombuffer(self._data, "<f4", 1, row * 4)[0])
