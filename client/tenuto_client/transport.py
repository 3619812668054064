"""Carries the effects of programs out over a gRPC channel, blocking the caller's thread."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc

from tenuto_client.address import check_address
from tenuto_client.effects import Call, Program, Sleep, T
from tenuto_client.errors import ClientClosedError, TenutoError, error_from_message, error_from_rpc
from tenuto_client.results import StepResult
from tenuto_client.session import Session
from tenuto_client.step import Step
from tenuto_client.stream import StepStream
from tenuto_proto.v1 import policy_pb2 as pb
from tenuto_proto.v1.policy_pb2_grpc import PolicyServiceStub

# RFC 6750. gRPC's own complaint about other characters would quote the token.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
CHANNEL_OPTIONS = (
    # Sizes are checked against the server's own limit before sending, see ServedPolicy.refuse_too_large.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC's own defaults leave a robot alone for up to two minutes after the server came back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A container that is started again may have another address; gRPC would ask for it every half minute.
    ("grpc.dns_min_time_between_resolutions_ms", 2000),
    # Finds out within half a minute that a mobile link went away without saying so.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Policies do not share connections, so that a balancer can spread them.
    ("grpc.use_local_subchannel_pool", 1),
)


Metadata = tuple[tuple[str, str], ...]


def authorization_of(token: str | None) -> Metadata:
    """Return what says who calls. Raises ValueError for a token that cannot travel; its text does not hold it."""
    if token is None:
        return ()
    token = token.strip()  # Files end with a newline.
    if not _TOKEN.fullmatch(token):
        raise ValueError(
            f"token: got {len(token)} characters, expected letters, digits and -._~+/ alone, perhaps = last"
        )
    return (("authorization", f"Bearer {token}"),)


def metadata_of(call: Call, authorization: Metadata) -> Metadata:
    """Return what travels beside a call."""
    return (("x-session-id", str(call.session_id)), *authorization) if call.session_id else authorization


def checked_reply(call: Call, reply: Any) -> Any:
    """Return a stream's reply, or the TenutoError that it holds."""
    if isinstance(reply, pb.StepBatchResponse) and reply.HasField("error"):
        return error_from_message(reply.error, call.server_epoch)
    return reply


class Transport:
    """One channel. Owned by one thread; close() may come from any."""

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials | None = None,
        *,
        token: str | None = None,
        stream: bool = False,
    ) -> None:
        """Connect lazily, with the first call. ``stream``: Step and StepBatch travel over one StepStream.

        ``token``: sent with every call, also where ``credentials`` are None and nothing is encrypted. Raises ValueError
        for an address at which no server can be, or a token that cannot be sent.
        """
        check_address(address)
        self._credentials, self._token = credentials, token
        self._authorization = authorization_of(token)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, CHANNEL_OPTIONS)
        self._stub: Any = PolicyServiceStub(self._channel)
        open_stream = partial(self._stub.StepStream, metadata=self._authorization)
        self._stream = StepStream(open_stream) if stream else None
        self.is_closed = False
        """Whether close() was called."""

    def step(self, session: Session, observation: Any, episode_start: bool, reward: float | None) -> StepResult:
        """Make a session's step and return its result; the usual one costs no program."""
        with session.alone:
            step = session.begin(observation, episode_start, reward)
            if step is None:
                program, answers = session.step(observation, episode_start, reward), None
            else:
                answer = self._stepped(step, session.first_attempt_s)
                result = step.success(answer)
                if result is not None:
                    session.applied(result)
                    return result
                program, answers = session.settle(step), [answer]
        return self.run(program, answers)

    def run(self, program: Program[T], answers: list[Any] | None = None) -> T:
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
                    time.sleep(effect.seconds)
                    effect = next(program)
                else:
                    effect = program.send(self._make(effect.calls))
        except StopIteration as stop:
            return stop.value
        finally:
            program.close()

    def to(self, address: str) -> Transport:
        """Return a transport to another address that is otherwise the same: who calls, whom it trusts, how it calls."""
        return Transport(address, self._credentials, token=self._token, stream=self._stream is not None)

    def close(self) -> None:
        """Close the channel; calls under way fail."""
        self.is_closed = True
        if self._stream is not None:
            self._stream.close()
        self._channel.close()

    def _make(self, calls: Sequence[Call]) -> list[Any]:
        if len(calls) == 1 and (self._stream is None or calls[0].method != "StepBatch"):
            [call] = calls
            if self._stream is None or call.step is None:
                return [self._blocking(call)]
            return [self._stepped(call.step, call.timeout_s)]
        try:
            started = [self._start(call) for call in calls]
        except ValueError as error:
            return [self._if_closed(error)] * len(calls)
        return [self._finish(call, handle) for call, handle in zip(calls, started, strict=True)]

    def _blocking(self, call: Call) -> Any:
        try:
            metadata = metadata_of(call, self._authorization)
            return getattr(self._stub, call.method)(call.request, timeout=call.timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            return error_from_rpc(error, call.server_epoch)
        except ValueError as error:
            # What gRPC raises on a channel that another thread has just closed.
            return self._if_closed(error)

    def _stepped(self, step: Step, timeout_s: float) -> Any:
        if self._stream is None:
            return self._blocking(step.call(timeout_s))
        try:
            reply = self._stream.send(step.form.join([step], timeout_s), timeout_s).result()
        except grpc.RpcError as error:
            return error_from_rpc(error, step.form.server_epoch)
        except TenutoError as error:
            return error
        except ValueError as error:
            return self._if_closed(error)
        return step.form.cut([step], reply)[0]

    def _start(self, call: Call) -> Any:
        if self._stream is not None and isinstance(call.request, pb.StepBatchRequest):
            return self._stream.send(call.request, call.timeout_s)
        method = getattr(self._stub, call.method)
        metadata = metadata_of(call, self._authorization)
        return method.future(call.request, timeout=call.timeout_s, metadata=metadata)

    def _finish(self, call: Call, handle: Any) -> Any:
        try:
            return checked_reply(call, handle.result())
        except grpc.RpcError as error:
            return error_from_rpc(error, call.server_epoch)
        except TenutoError as error:
            return error

    def _if_closed(self, error: Exception) -> TenutoError:
        if self.is_closed:
            return ClientClosedError("the policy was closed")
        raise error
