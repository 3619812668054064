"""The network between clients and servers: grpc.aio's channels and contexts, as far as tenuto uses them.

Messages are serialised. Unary calls are lost, answered in vain, doubled, delayed and so reordered; streams keep their
order, stall and break. A server that dies takes its connections along.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import grpc
import grpc.aio

from tenuto_proto.v1 import policy_pb2 as pb

_EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]
BALANCER = "balancer:1"
"""The address in front of servers that share a store."""
_METHODS = {m.name: m for m in pb.DESCRIPTOR.services_by_name["PolicyService"].methods}
_NOTHING = contextvars.Context()


@cache
def _request_class(method: str) -> Any:
    return getattr(pb, _METHODS[method].input_type.name)


def rpc_error(code: grpc.StatusCode, details: str, trailing: Any = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


class Network:
    """Knows who listens where. ``faults`` are probabilities, zero while the network is well."""

    def __init__(self, world: Any) -> None:
        self.world, self.loop, self.rng = world, world.loop, world.rng_of("network")
        self.loss = self.reply_loss = self.double = self.slow = 0.0
        self.delay_s = 1e-4
        self.cut_off: set[str] = set()
        """Addresses that nobody reaches."""
        self.channels: list[Channel] = []

    def channel(self, address: str) -> Channel:
        channel = Channel(self, address)
        self.channels.append(channel)
        return channel

    def delay(self) -> float:
        """Seconds that a message takes."""
        delay = self.delay_s * self.rng.expovariate(1.0) + 1e-6
        if self.slow and self.rng.random() < self.slow:
            self.world.count("delayed")
            delay += self.rng.choice((0.005, 0.05, 0.5)) * self.rng.random()
        return delay

    def later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        """Do something that is no process's."""
        return self.loop.call_later(delay_s, callback, *args, context=_NOTHING)

    def happens(self, probability: float, what: str) -> bool:
        if probability and self.rng.random() < probability:
            self.world.count(what)
            return True
        return False

    def server(self, channel: Channel) -> Any:
        """The process that a channel reaches now. The balancer stays with one as long as that listens."""
        if channel.address != BALANCER:
            return self._listening(channel.address)
        process = self._listening(channel.host)
        if process is None:
            up = [host.address for host in self.world.hosts if self._listening(host.address) is not None]
            if up:
                channel.host = self.rng.choice(up)
                process = self._listening(channel.host)
        return process

    def _listening(self, address: str) -> Any:
        process = None if address in self.cut_off else self.world.server_at(address)
        return process if process is not None and process.is_listening else None

    def crashed(self, process: Any) -> None:
        """Its connections break; sometimes nobody says so."""
        calls, process.calls = list(process.calls), {}
        for call in calls:
            if self.rng.random() < 0.8:
                self.later(self.delay(), call.fail, "the connection was reset")

    def cut(self, channel: Channel) -> None:
        """Break the connection of one client."""
        for call in list(channel.calls):
            call.fail("the connection was cut")
            call.leave(self.delay())


class Channel:
    """One client's connection."""

    def __init__(self, network: Network, address: str) -> None:
        self.network, self.address = network, address
        self.host = address
        """Where the balancer sends it."""
        self.calls: dict[Any, None] = {}
        self.is_closed = False

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        method = path.rpartition("/")[2]

        async def call(request: Any, timeout: float, metadata: Any = ()) -> Any:
            under_way = UnaryCall(self, method, request_serializer(request), timeout, tuple(metadata or ()))
            return response_deserializer(await under_way.result())

        return call

    def stream_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(metadata: Any = ()) -> StreamCall:
            return StreamCall(self, request_serializer, response_deserializer, tuple(metadata or ()))

        return call

    async def close(self) -> None:
        self.is_closed = True
        for call in list(self.calls):
            call.cancel()


class AbortedError(grpc.aio.AbortError):
    """What a server's method ends with that has refused."""


class Context:
    """What a method of the server knows of its call."""

    def __init__(self, call: Any, process: Any, end_s: float | None) -> None:
        self._call, self._process, self._end_s = call, process, end_s
        self.status: tuple[grpc.StatusCode, str, Any] | None = None

    def peer(self) -> str:
        return self._call.peer

    def invocation_metadata(self) -> Any:
        return self._call.metadata

    def time_remaining(self) -> float | None:
        return None if self._end_s is None else self._end_s - self._process.loop.now_s

    def done(self) -> bool:
        return self._call.is_left

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        self.status = code, details, trailing_metadata
        raise AbortedError


class UnaryCall:
    """One call, which may arrive never, once or twice."""

    def __init__(self, channel: Channel, method: str, data: bytes, timeout_s: float, metadata: Any) -> None:
        network = channel.network
        self.channel, self.network, self.method, self.data, self.metadata = channel, network, method, data, metadata
        self.peer = f"ipv4:10.0.0.{1 + network.channels.index(channel) % 200}:1"
        self.is_left = False
        self._answer: asyncio.Future[bytes] = network.loop.create_future()
        self._end_s = network.loop.now_s + timeout_s
        self._timer = network.later(timeout_s, self._expire)
        self._tasks: list[asyncio.Task[None]] = []
        channel.calls[self] = None
        if network.happens(network.loss, "request lost"):
            return
        network.later(network.delay(), self._arrive, False)
        if network.happens(network.double, "request doubled"):
            network.later(network.delay() + network.delay(), self._arrive, True)

    async def result(self) -> bytes:
        try:
            return await self._answer
        except asyncio.CancelledError:
            self.leave(self.network.delay())
            raise
        finally:
            self._timer.cancel()
            self.channel.calls.pop(self, None)

    def cancel(self) -> None:
        self._answer.cancel()

    def fail(self, details: str) -> None:
        self._finish(rpc_error(grpc.StatusCode.UNAVAILABLE, details))

    def leave(self, delay_s: float) -> None:
        """Have the server hear that nobody waits any more."""
        if self.network.rng.random() < 0.8:
            self.network.later(delay_s, self._cancel_there)

    def _expire(self) -> None:
        self._finish(rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def _finish(self, outcome: bytes | Exception) -> None:
        if self._answer.done():
            return
        if isinstance(outcome, Exception):
            self._answer.set_exception(outcome)
        else:
            self._answer.set_result(outcome)

    def _cancel_there(self) -> None:
        self.is_left = True
        for task in self._tasks:
            task.cancel()

    def _arrive(self, is_copy: bool) -> None:
        process = self.network.server(self.channel)
        if process is None:
            if not is_copy:
                self.network.later(self.network.delay(), self.fail, "connection refused")
            return
        process.calls[self] = None
        self._tasks.append(process.start(self._serve(process)))

    async def _serve(self, process: Any) -> None:
        network, world = self.network, self.network.world
        remaining_s = self._end_s - network.loop.now_s
        timer = network.later(max(remaining_s, 0.0), self._cancel_there)
        context = Context(self, process, self._end_s)
        request = _request_class(self.method).FromString(self.data)
        try:
            response = await getattr(process.service, self.method)(request, context)
        except AbortedError:
            assert context.status is not None
            code, details, trailing = context.status
            world.laws.refused(process, self.method, request, trailing)
            outcome: Any = rpc_error(code, details, trailing)
        else:
            if process.is_dead:
                return
            world.laws.replied(process, self.method, request, response)
            outcome = response.SerializeToString()
        finally:
            timer.cancel()
            process.calls.pop(self, None)
        if process.is_dead:
            return
        if self.method.startswith("Step"):
            # The reply is on its way, or not any more.
            is_sent = network.rng.random() < 0.5
            if is_sent:
                self._send_back(outcome)
            world.failpoint("between_reply_and_ack")
            if is_sent:
                return
        self._send_back(outcome)

    def _send_back(self, outcome: bytes | Exception) -> None:
        network = self.network
        if not network.happens(network.reply_loss, "reply lost"):
            network.later(network.delay(), self._finish, outcome)


class Pipe:
    """One direction of a stream."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._on_way: deque[bytes] = deque()
        self._messages: deque[bytes] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._last_s = 0.0
        self.end: Any = None
        """What comes after the messages: EOF or an error."""

    def send(self, data: bytes) -> None:
        network = self._network
        self._last_s = max(self._last_s, network.loop.now_s + network.delay())
        self._on_way.append(data)
        network.loop.call_at(self._last_s, self._arrive, context=_NOTHING)

    def finish(self, end: Any) -> None:
        """Let nothing more come: what has arrived is still read, what is on its way is lost."""
        if self.end is None:
            self.end = end
            self._wake()

    def _arrive(self) -> None:
        data = self._on_way.popleft()
        if self.end is None:
            self._messages.append(data)
            self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def receive(self) -> Any:
        """The next message, or how it ends."""
        while not self._messages and self.end is None:
            self._waiting = self._network.loop.create_future()
            await self._waiting
        if self._messages:
            return self._messages.popleft()
        return self.end


class StreamCall:
    """One StepStream, as its client sees it; the server's side is a StreamContext."""

    def __init__(self, channel: Channel, serialize: Any, deserialize: Any, metadata: Any) -> None:
        network = channel.network
        self.channel, self.network, self.metadata = channel, network, metadata
        self._serialize, self._deserialize = serialize, deserialize
        self.peer = f"ipv4:10.0.0.{1 + network.channels.index(channel) % 200}:1"
        self.is_left = False
        self.up, self.down = Pipe(network), Pipe(network)
        self._task: asyncio.Task[None] | None = None
        self.requests: dict[int, tuple[Any, float]] = {}
        """What the server has read and not answered, and when it read it."""
        channel.calls[self] = None
        network.later(network.delay(), self._arrive)

    def has_waited(self, seconds: float) -> bool:
        """Whether a request has not been answered for so long."""
        return any(since_s < self.network.loop.now_s - seconds for _, since_s in self.requests.values())

    async def write(self, request: Any) -> None:
        if self.down.end is not None or self.is_left:
            raise asyncio.InvalidStateError("the stream has ended")
        self.up.send(self._serialize(request))
        await asyncio.sleep(0)

    async def read(self) -> Any:
        got = await self.down.receive()
        if isinstance(got, bytes):
            return self._deserialize(got)
        self.channel.calls.pop(self, None)
        if isinstance(got, BaseException):
            raise got
        return got

    def cancel(self) -> None:
        self.down.finish(asyncio.CancelledError())
        self.leave(self.network.delay())

    def fail(self, details: str) -> None:
        self.down.finish(rpc_error(grpc.StatusCode.UNAVAILABLE, details))

    def leave(self, delay_s: float) -> None:
        self.network.later(delay_s, self._cancel_there)

    def _cancel_there(self) -> None:
        self.is_left = True
        self.up.finish(_EOF)
        if self._task is not None:
            self._task.cancel()

    def _arrive(self) -> None:
        process = self.network.server(self.channel)
        if process is None or self.is_left:
            self.network.later(self.network.delay(), self.fail, "connection refused")
            return
        process.calls[self] = None
        self._task = process.start(self._serve(process))

    async def _serve(self, process: Any) -> None:
        context = StreamContext(self, process)
        end: Any = _EOF
        try:
            await process.service.StepStream(None, context)
        except AbortedError:
            assert context.status is not None
            end = rpc_error(*context.status)
        except asyncio.CancelledError:
            end = rpc_error(grpc.StatusCode.CANCELLED, "cancelled")
        finally:
            process.calls.pop(self, None)
        if not process.is_dead:
            self.network.later(self.network.delay(), self.down.finish, end)


class StreamContext(Context):
    """What the server reads from and writes to."""

    def __init__(self, call: StreamCall, process: Any) -> None:
        super().__init__(call, process, None)
        self._requests = call.requests

    async def read(self) -> Any:
        got = await self._call.up.receive()
        if got is _EOF:
            return got
        request = pb.StepBatchRequest.FromString(got)
        self._requests[request.request_id] = request, self._process.loop.now_s
        return request

    async def write(self, response: Any) -> None:
        if self._process.is_dead:
            return
        world, (request, _) = self._call.network.world, self._requests.pop(response.request_id)
        if not response.HasField("error"):
            world.laws.replied(self._process, "StepStream", request, response)
        self._call.down.send(response.SerializeToString())
        world.failpoint("between_reply_and_ack")
        await asyncio.sleep(0)


class ListeningServer:
    """What grpc.aio.server would be: stops taking calls, and waits for those under way."""

    def __init__(self, process: Any) -> None:
        self._process = process
        process.is_listening = True

    async def stop(self, grace_s: float) -> None:
        process = self._process
        process.is_listening = False
        end_s = process.loop.now_s + grace_s
        while process.calls and process.loop.now_s < end_s:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        unanswered = [c.method for c in process.calls if isinstance(c, UnaryCall)]
        unanswered += ["StepStream" for c in process.calls if isinstance(c, StreamCall) and c.has_waited(0.5)]
        process.world.laws.stopped(process, unanswered)
        for call in list(process.calls):
            call.leave(0.0)
            call.fail("the server has stopped")
