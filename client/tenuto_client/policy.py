"""RemotePolicy and AsyncRemotePolicy: the policy of one environment, computed on a server that keeps its memory."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import grpc

from tenuto_client.aio_transport import AioTransport
from tenuto_client.errors import TenutoError
from tenuto_client.options import OnWait, PolicyOptions
from tenuto_client.results import StepResult
from tenuto_client.served import ServedPolicy
from tenuto_client.session import Session
from tenuto_client.transport import Transport

if TYPE_CHECKING:
    from gymnasium import Space

SessionTransport = Literal["unary", "stream"]
"""``unary``: a call per step; ``stream``: a message on a stream, which is sooner there and cheaper for the server. All
AsyncRemotePolicy of an event loop share a connection to the server and its stream, where steps that are ready together
travel in one message: far cheaper for both sides.
"""


class RemotePolicy:
    """Chooses the actions of one environment::

        with RemotePolicy("localhost:50051") as policy:
            action = policy.step(observation, episode_start=True).action

    Used by one thread at a time. Errors are the classes of ``tenuto_client.errors``.
    """

    def __init__(
        self,
        address: str,
        policy_name: str = "",
        *,
        transport: SessionTransport = "unary",
        version: int = 0,
        seed: int | None = None,
        deterministic: bool = False,
        outputs: Iterable[str] = ("value", "log_prob"),
        timeout_s: float = 5.0,
        wait_for_policy_s: float = 0.0,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
    ) -> None:
        """Connect with the first use. ``address`` is host:port, ``transport`` is explained in SessionTransport.

        ``credentials``: gRPC's, for TLS; None: not encrypted. ``token``: says who calls, where the server asks; whoever
        can read the network reads it where nothing is encrypted. The other arguments are in PolicyOptions.
        """
        self._session = Session(
            PolicyOptions.build(policy_name, version, seed, deterministic, outputs, timeout_s, wait_for_policy_s)
        )
        self._transport = Transport(address, credentials, token=token, stream=is_stream(transport))

    def connect(self, on_wait: OnWait = None) -> ServedPolicy:
        """Find the policy and open a session now rather than with the first step. Repeating it does nothing.

        ``on_wait`` is told each error that is waited out, see ``wait_for_policy_s``.
        """
        return self._transport.run(self._session.connect(on_wait))

    @property
    def served(self) -> ServedPolicy:
        """What the server says about the policy; connects where that has not happened."""
        return self._session.served or self.connect()

    @property
    def observation_space(self) -> Space[Any]:
        """The space of observations; MissingExtraError without gymnasium."""
        return self.served.observation_space()

    @property
    def action_space(self) -> Space[Any]:
        """The space of actions; MissingExtraError without gymnasium."""
        return self.served.action_space()

    @property
    def session_id(self) -> int:
        """The id of the open session; 0 where there is none."""
        return self._session.session_id

    @property
    def step_index(self) -> int:
        """The index that the next step will have."""
        return self._session.step_index

    def reset(self) -> None:
        """Mark that the next step begins an episode, as ``episode_start=True`` on that step would."""
        self._session.reset()

    def step(self, observation: Any, *, episode_start: bool = False, reward: float | None = None) -> StepResult:
        """Send an observation and return the action.

        ``episode_start``: the observation is an episode's first; that of the first step always is. ``reward``: what the
        previous action earned, also where it was the last of the episode before; for the server's statistics.

        Every observation is applied exactly once, in order. Failures that a retry can mend are retried until
        ``timeout_s`` is over. If the outcome is still unknown then (``error.outcome_unknown``), call step again with
        the same observation, which returns the action of the one step; called with another observation, step first
        completes the pending one. After any other error the session is where it was before the call.

        Where the session is gone (SessionGoneError: the server restarted, or the idle timeout passed) the running
        episode is lost. An episode's first step opens a new session by itself.
        """
        return self._transport.step(self._session, observation, episode_start, reward)

    def move(self, address: str) -> None:
        """Go on with the session, in the middle of its episode, at another server, with the same credentials.

        That server must serve the episode's version with the same weights. Where it cannot go on (SnapshotError,
        CapacityError, ServerUnavailableError and others), the session goes on where it was. A step whose outcome is
        unknown stays so, and is settled there by the next call. Safe to repeat.
        """
        there = self._transport.to(address)
        try:
            self._transport.run(self._session.export())
            try:
                there.run(self._session.import_here())
            except TenutoError:
                with suppress(TenutoError):
                    self._transport.run(self._session.thaw())
                raise
        except BaseException:
            there.close()
            raise
        here, self._transport = self._transport, there
        here.close()

    def close(self, reward: float | None = None) -> None:
        """End the session, with the reward of its last action, and the connection. Repeating it does nothing."""
        if not self._transport.is_closed:
            try:
                self._transport.run(self._session.close(reward))
            finally:
                self._transport.close()

    def __enter__(self) -> RemotePolicy:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncRemotePolicy:
    """RemotePolicy for asyncio: the same methods as coroutines, used by one task at a time."""

    def __init__(
        self,
        address: str,
        policy_name: str = "",
        *,
        transport: SessionTransport = "unary",
        version: int = 0,
        seed: int | None = None,
        deterministic: bool = False,
        outputs: Iterable[str] = ("value", "log_prob"),
        timeout_s: float = 5.0,
        wait_for_policy_s: float = 0.0,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
    ) -> None:
        """As RemotePolicy's."""
        self._session = Session(
            PolicyOptions.build(policy_name, version, seed, deterministic, outputs, timeout_s, wait_for_policy_s)
        )
        self._transport = AioTransport(address, credentials, token=token, shared=is_stream(transport))

    async def connect(self, on_wait: OnWait = None) -> ServedPolicy:
        """As RemotePolicy.connect."""
        return await self._transport.run(self._session.connect(on_wait))

    @property
    def served(self) -> ServedPolicy:
        """What the server says about the policy. Raises TenutoError before the first connect or step."""
        if self._session.served is None:
            raise TenutoError("the policy is not connected yet: await connect() first")
        return self._session.served

    @property
    def observation_space(self) -> Space[Any]:
        """As RemotePolicy.observation_space, once connected."""
        return self.served.observation_space()

    @property
    def action_space(self) -> Space[Any]:
        """As RemotePolicy.action_space, once connected."""
        return self.served.action_space()

    @property
    def session_id(self) -> int:
        """As RemotePolicy.session_id."""
        return self._session.session_id

    @property
    def step_index(self) -> int:
        """As RemotePolicy.step_index."""
        return self._session.step_index

    def reset(self) -> None:
        """As RemotePolicy.reset."""
        self._session.reset()

    async def step(self, observation: Any, *, episode_start: bool = False, reward: float | None = None) -> StepResult:
        """As RemotePolicy.step. Cancelling it leaves the outcome unknown, which the next call settles."""
        return await self._transport.step(self._session, observation, episode_start, reward)

    async def move(self, address: str) -> None:
        """As RemotePolicy.move."""
        there = self._transport.to(address)
        try:
            await self._transport.run(self._session.export())
            try:
                await there.run(self._session.import_here())
            except TenutoError:
                with suppress(TenutoError):
                    await self._transport.run(self._session.thaw())
                raise
        except BaseException:
            await there.close()
            raise
        here, self._transport = self._transport, there
        await here.close()

    async def close(self, reward: float | None = None) -> None:
        """As RemotePolicy.close."""
        if not self._transport.is_closed:
            try:
                await self._transport.run(self._session.close(reward))
            finally:
                await self._transport.close()

    async def __aenter__(self) -> AsyncRemotePolicy:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def is_stream(transport: str) -> bool:
    """Check the argument. Raises ValueError."""
    if transport not in ("unary", "stream"):
        raise ValueError(f"transport: got {transport!r}, expected 'unary' or 'stream'")
    return transport == "stream"
