"""Carries the effects of programs out over a grpc.aio channel."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import grpc
import grpc.aio

from tenuto_client.address import check_address
from tenuto_client.aio_stream import AioStepStream, open_channel
from tenuto_client.effects import Call, Program, Sleep, T
from tenuto_client.errors import ClientClosedError, TenutoError, error_from_rpc
from tenuto_client.results import StepResult
from tenuto_client.session import Session
from tenuto_client.shared_stream import SharedStream
from tenuto_client.step import Step
from tenuto_client.transport import authorization_of, checked_reply, metadata_of
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1.policy_pb2_grpc import PolicyServiceStub


class AioTransport:
    """One channel of one event loop: the one in which the first program runs."""

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials | None = None,
        *,
        token: str | None = None,
        stream: bool = False,
        shared: bool = False,
    ) -> None:
        """Open nothing yet, so that it can be built outside the loop.

        ``stream``: StepBatch travels over one StepStream. ``shared``: the connection is that of all others to this
        address with the same token, and Step travels over their common stream. ``token``: as Transport's.
        """
        self._token, self._authorization = token, authorization_of(token)
        self._address, self._credentials, self._uses_stream = check_address(address), credentials, stream
        self._is_shared = shared
        self._shared: SharedStream | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._stream: AioStepStream | None = None
        self.is_closed = False
        """Whether close() was called."""

    async def step(self, session: Session, observation: Any, episode_start: bool, reward: float | None) -> StepResult:
        """Make a session's step and return its result; the usual one costs no program."""
        with session.alone:
            step = session.begin(observation, episode_start, reward)
            if step is None:
                program, answers = session.step(observation, episode_start, reward), None
            else:
                answer = await self._stepped(step, session.first_attempt_s)
                result = step.success(answer)
                if result is not None:
                    session.applied(result)
                    return result
                program, answers = session.settle(step), [answer]
        return await self.run(program, answers)

    async def run(self, program: Program[T], answers: list[Any] | None = None) -> T:
        """Carry a program out and return its result. Raises what it raises.

        ``answers``: to the program's first effect, which was carried out before.
        """
        try:
            effect = next(program)
            if answers is not None:
                effect = program.send(answers)
            while True:
                if self.is_closed:
                    effect = program.throw(ClientClosedError("the policy was closed"))
                elif isinstance(effect, Sleep):
                    await asyncio.sleep(effect.seconds)
                    effect = next(program)
                elif len(effect.calls) == 1:
                    effect = program.send([await self._make(effect.calls[0])])
                else:
                    effect = program.send(await asyncio.gather(*map(self._make, effect.calls)))
        except StopIteration as stop:
            return stop.value
        finally:
            program.close()

    def to(self, address: str) -> AioTransport:
        """As Transport.to."""
        return AioTransport(
            address, self._credentials, token=self._token, stream=self._uses_stream, shared=self._is_shared
        )

    async def close(self) -> None:
        """Close the channel; calls under way fail."""
        self.is_closed = True
        if self._stream is not None:
            await self._stream.close()
        if self._shared is not None:
            shared, self._shared = self._shared, None
            await shared.release()
        elif self._channel is not None:
            await self._channel.close()

    async def _stepped(self, step: Step, timeout_s: float) -> Any:
        if self._shared is not None:
            return await self._shared.send(step, timeout_s)
        return await self._make(step.call(timeout_s))

    async def _make(self, call: Call) -> Any:
        if self._channel is None:
            self._open()
        try:
            if self._stream is not None and isinstance(call.request, pb.StepBatchRequest):
                return checked_reply(call, await self._stream.send(call.request, call.timeout_s))
            if self._shared is not None and call.step is not None:
                return await self._shared.send(call.step, call.timeout_s)
            method = getattr(self._stub, call.method)
            metadata = metadata_of(call, self._authorization)
            return await method(call.request, timeout=call.timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            return error_from_rpc(error, call.server_epoch)
        except TenutoError as error:
            return error
        except (asyncio.CancelledError, grpc.aio.UsageError):
            # What gRPC raises where close() took the channel away.
            if not self.is_closed:
                raise
            return ClientClosedError("the policy was closed")

    def _open(self) -> None:
        if self._is_shared:
            self._shared = SharedStream.acquire(self._address, self._credentials, self._authorization)
            self._channel, self._stub = self._shared.channel, self._shared.stub
            return
        self._channel = open_channel(self._address, self._credentials)
        self._stub = PolicyServiceStub(self._channel)
        if self._uses_stream:
            self._stream = AioStepStream(partial(self._stub.StepStream, metadata=self._authorization))
