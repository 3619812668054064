"""RemoteVectorPolicy and AsyncRemoteVectorPolicy: the policy of many environments, one request per step for all."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import grpc
from numpy.typing import ArrayLike

from tenuto_client.aio_transport import AioTransport
from tenuto_client.errors import TenutoError
from tenuto_client.options import OnWait, PolicyOptions
from tenuto_client.results import VectorStepResult
from tenuto_client.served import ServedPolicy
from tenuto_client.session_rows import SessionRows
from tenuto_client.transport import Transport

if TYPE_CHECKING:
    from gymnasium import Space

VectorTransport = Literal["batch", "stream"]
"""``batch``: a StepBatch call per step; ``stream``: one StepStream for all, at half the cost to the server."""


class RemoteVectorPolicy:
    """Chooses the actions of N environments::

        with RemoteVectorPolicy("localhost:50051", envs.num_envs) as policy:
            actions = policy.step(observations).actions

    Used by one thread at a time. Errors are the classes of ``tenuto_client.errors``.
    """

    def __init__(
        self,
        address: str,
        num_envs: int,
        policy_name: str = "",
        *,
        transport: VectorTransport = "batch",
        version: int = 0,
        seed: int | None = None,
        deterministic: bool = False,
        outputs: Iterable[str] = ("value", "log_prob"),
        timeout_s: float = 5.0,
        wait_for_policy_s: float = 0.0,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
    ) -> None:
        """Connect with the first use. ``address`` is host:port; ``credentials`` and ``token`` are as for RemotePolicy,
        the other arguments are explained in PolicyOptions.
        """
        options = PolicyOptions.build(policy_name, version, seed, deterministic, outputs, timeout_s, wait_for_policy_s)
        self._rows = SessionRows(options, num_envs)
        self._transport = Transport(address, credentials, token=token, stream=is_stream(transport))

    @property
    def num_envs(self) -> int:
        """N."""
        return self._rows.num_envs

    def connect(self, on_wait: OnWait = None) -> ServedPolicy:
        """Find the policy and open N sessions now rather than with the first step. Repeating it does nothing.

        ``on_wait`` is told each error that is waited out, see ``wait_for_policy_s``.
        """
        return self._transport.run(self._rows.connect(on_wait))

    @property
    def served(self) -> ServedPolicy:
        """What the server says about the policy; connects where that has not happened."""
        return self._rows.served or self.connect()

    @property
    def observation_space(self) -> Space[Any]:
        """The space of one environment's observations; MissingExtraError without gymnasium."""
        return self.served.observation_space()

    @property
    def action_space(self) -> Space[Any]:
        """The space of one environment's actions; MissingExtraError without gymnasium."""
        return self.served.action_space()

    @property
    def session_ids(self) -> list[int]:
        """The ids of the N sessions; 0 where none is open."""
        return self._rows.session_ids.tolist()

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Mark that the next step begins an episode in these rows; None: in all."""
        self._rows.reset(rows)

    def step(
        self,
        observations: Any,
        *,
        episode_starts: ArrayLike | None = None,
        rewards: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        raise_errors: bool = True,
    ) -> VectorStepResult:
        """Send N observations, in the layout of gymnasium's vector environments, and return N actions.

        ``episode_starts``: bool ``[N]``, where the observation is an episode's first; those of the first step always
        are. ``rewards``: float ``[N]``, what the previous actions earned, NaN where that is not known. ``mask``: bool
        ``[N]``, the rows to step; the others rest and their observations are not looked at. None: all rows.

        Each row keeps the promises of RemotePolicy.step by itself. Rows that fail in a way that a retry can mend are
        retried until ``timeout_s`` is over. Where rows have failed for good the step raises: RowsError, whose
        ``result`` holds the actions of the rows that did step, or the one error where all rows failed alike. With
        ``raise_errors=False`` it returns, and ``errors`` of the result says which rows have no action.
        """
        return self._transport.run(self._rows.step(observations, episode_starts, rewards, mask, raise_errors))

    def close(self, rewards: ArrayLike | None = None) -> None:
        """End the sessions, with the rewards of their last actions, and the connection. Repeating it does nothing."""
        if not self._transport.is_closed:
            try:
                self._transport.run(self._rows.close(rewards))
            finally:
                self._transport.close()

    def __enter__(self) -> RemoteVectorPolicy:
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


class AsyncRemoteVectorPolicy:
    """RemoteVectorPolicy for asyncio: the same methods as coroutines, used by one task at a time."""

    def __init__(
        self,
        address: str,
        num_envs: int,
        policy_name: str = "",
        *,
        transport: VectorTransport = "batch",
        version: int = 0,
        seed: int | None = None,
        deterministic: bool = False,
        outputs: Iterable[str] = ("value", "log_prob"),
        timeout_s: float = 5.0,
        wait_for_policy_s: float = 0.0,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
    ) -> None:
        """As RemoteVectorPolicy's."""
        options = PolicyOptions.build(policy_name, version, seed, deterministic, outputs, timeout_s, wait_for_policy_s)
        self._rows = SessionRows(options, num_envs)
        self._transport = AioTransport(address, credentials, token=token, stream=is_stream(transport))

    @property
    def num_envs(self) -> int:
        """N."""
        return self._rows.num_envs

    async def connect(self, on_wait: OnWait = None) -> ServedPolicy:
        """As RemoteVectorPolicy.connect."""
        return await self._transport.run(self._rows.connect(on_wait))

    @property
    def served(self) -> ServedPolicy:
        """What the server says about the policy. Raises TenutoError before the first connect or step."""
        if self._rows.served is None:
            raise TenutoError("the policy is not connected yet: await connect() first")
        return self._rows.served

    @property
    def observation_space(self) -> Space[Any]:
        """As RemoteVectorPolicy.observation_space, once connected."""
        return self.served.observation_space()

    @property
    def action_space(self) -> Space[Any]:
        """As RemoteVectorPolicy.action_space, once connected."""
        return self.served.action_space()

    @property
    def session_ids(self) -> list[int]:
        """As RemoteVectorPolicy.session_ids."""
        return self._rows.session_ids.tolist()

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """As RemoteVectorPolicy.reset."""
        self._rows.reset(rows)

    async def step(
        self,
        observations: Any,
        *,
        episode_starts: ArrayLike | None = None,
        rewards: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        raise_errors: bool = True,
    ) -> VectorStepResult:
        """As RemoteVectorPolicy.step. Cancelling it leaves the outcome unknown, which the next call settles."""
        return await self._transport.run(self._rows.step(observations, episode_starts, rewards, mask, raise_errors))

    async def close(self, rewards: ArrayLike | None = None) -> None:
        """As RemoteVectorPolicy.close."""
        if not self._transport.is_closed:
            try:
                await self._transport.run(self._rows.close(rewards))
            finally:
                await self._transport.close()

    async def __aenter__(self) -> AsyncRemoteVectorPolicy:
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
    if transport not in ("batch", "stream"):
        raise ValueError(f"transport: got {transport!r}, expected 'batch' or 'stream'")
    return transport == "stream"
