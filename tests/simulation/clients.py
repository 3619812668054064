"""Who plays: the production clients, each on its own plan, told apart from an undisturbed run by nothing but time."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np

from simulation import laws
from simulation.laws import Chain
from simulation.rolling import observe
from tenuto_client import AsyncRemotePolicy, AsyncRemoteVectorPolicy
from tenuto_client.errors import (
    CapacityError,
    ComputeError,
    DeadlineError,
    OverloadedError,
    PolicyUnknownError,
    ServerUnavailableError,
    SessionGoneError,
    StepInFlightError,
    TenutoError,
    VersionUnknownError,
)
from tenuto_client.options import PolicyOptions
from tenuto_client.retry import Timing
from tenuto_client.session import Session
from tenuto_client.session_rows import SessionRows

_PASSES = (ServerUnavailableError, DeadlineError, OverloadedError, CapacityError, StepInFlightError, ComputeError,
           PolicyUnknownError)  # fmt: skip
"""Errors that faults explain and that pass with them."""
_OUTPUTS = frozenset({"value"})


class SimulatedPolicy(AsyncRemotePolicy):
    """The public client, with the simulated clock and chance."""

    def __init__(self, address: str, options: PolicyOptions, *, stream: bool, token: str | None) -> None:
        super().__init__(address, transport="stream" if stream else "unary", token=token)
        self.session = self._session = Session(options)


class SimulatedVectorPolicy(AsyncRemoteVectorPolicy):
    """As SimulatedPolicy."""

    def __init__(self, address: str, num_envs: int, options: PolicyOptions, *, stream: bool, token: str | None) -> None:
        super().__init__(address, num_envs, transport="stream" if stream else "batch", token=token)
        self.rows = self._rows = SessionRows(options, num_envs)


class Client(ABC):
    """What all have in common. ``is_last``: a few more steps and it is done."""

    def __init__(self, world: Any, name: str) -> None:
        self.world, self.name, self.is_last = world, name, False
        self.rng: random.Random = world.rng_of(name)
        self.address = world.address(self.rng)
        self.principal = "prober" if "Prober" in name else "robots"
        self.token = world.tokens.get(self.principal)
        self.num_sessions = 1

    def options(self, **options: Any) -> PolicyOptions:
        rng = random.Random(self.rng.getrandbits(64))
        timing = Timing(clock=self.world.loop.time, rng=rng)
        return PolicyOptions(outputs=_OUTPUTS, timing=timing, timeout_s=self.rng.choice((1.0, 5.0)), **options)

    def seen(self) -> tuple[int, int]:
        return self.rng.randrange(1000), self.rng.randrange(1000)

    def begins(self) -> bool:
        return self.rng.random() < 0.05

    async def think(self) -> None:
        if (chance := self.rng.random()) < 0.1:
            await asyncio.sleep(self.rng.expovariate(10) if chance < 0.01 else self.rng.random() * 0.01)

    def chains(self) -> Iterable[Chain]:
        """The sessions that are open, as they should be."""
        return ()

    @abstractmethod
    async def play(self) -> None:
        """Do what this client does until its world ends."""

    @abstractmethod
    async def close(self) -> None:
        """End the sessions."""


class Player(Client):
    """A client with environments, which goes on for a few steps when it is told to end."""

    async def play(self) -> None:
        while not self.is_last:
            await self._step()
            await self.think()
        for _ in range(3):
            await self._step()

    @abstractmethod
    async def _step(self) -> None: ...


class OneEnv(Player):
    """One environment with a policy of its own."""

    def __init__(self, world: Any, name: str, *, stream: bool) -> None:
        super().__init__(world, name)
        seed = self.rng.getrandbits(32) if self.rng.random() < 0.3 else None
        self._greedy = self.rng.random() < 0.2
        options = self.options(seed=seed, deterministic=self._greedy)
        self.policy = SimulatedPolicy(self.address, options, stream=stream, token=self.token)
        self._seed = seed
        self._chain: Chain | None = None
        self._unsettled: tuple[int, int] | None = None
        """An observation that may have been applied, in whose place another one is sent now."""

    def chains(self) -> Iterable[Chain]:
        return () if self._chain is None or not self.policy.session_id else (self._chain,)

    async def _step(self) -> None:
        seen, begins = self.seen(), self.begins()
        since_s, num_downs = self.world.loop.now_s, self.world.num_downs
        while True:
            try:
                result = await self._send(seen, begins)
            except SessionGoneError as error:
                self.world.laws.lost(self._chain, error)
                self._chain, self._unsettled, begins = None, None, True
            except TenutoError as error:
                self._failed(error)
                if isinstance(error, VersionUnknownError) and self.world.has_swapped and not begins:
                    # What was published was replaced: it will never be there again.
                    if error.outcome_unknown and self._unsettled is None:
                        self._unsettled = seen
                    begins = True
                is_settled = self._unsettled is None and self._chain is not None
                if error.outcome_unknown and not begins and is_settled and self.rng.random() < 0.2:
                    self._unsettled, seen = seen, self.seen()
                await asyncio.sleep(self.rng.random() * 0.1)
            else:
                break
        session_id = self.policy.session_id
        if self._chain is not None and self._chain.session_id != session_id:
            self.world.laws.lost(self._chain, None, "replaced at an episode's start")
            self._chain = None
        if self._chain is None:
            seed = session_id if self._seed is None else self._seed
            self._chain = Chain(session_id, seed, self._greedy, num_downs=num_downs, born_s=since_s)
            self._unsettled = None
        chain = self._chain
        self._settle(chain, result.step_index)
        self.world.laws.stepped(
            chain, seen, begins, since_s, index=result.step_index, version=result.version, action=result.action,
            value=result.value, durable=result.durable_step,
        )  # fmt: skip

    def _settle(self, chain: Chain, step_index: int) -> None:
        """Take in that the step was applied whose reply nobody saw."""
        if self._unsettled is not None and step_index == chain.index + 1:
            chain.apply(self._unsettled, False, [])
        self._unsettled = None

    def _failed(self, error: TenutoError) -> None:
        self.world.trace("failed", self.name, type(error).__name__)
        if not isinstance(error, _PASSES):
            self.world.laws.broken(laws.ERROR, f"{self.name}: {error!r}")
        if self._chain is not None and not error.outcome_unknown and self.policy.session_id == self._chain.session_id:
            self._settle(self._chain, self.policy.step_index)

    async def _send(self, seen: tuple[int, int], begins: bool) -> Any:
        """Step; sometimes the caller loses patience before."""
        stepping = self.policy.step(observe(*seen), episode_start=begins)
        if self.rng.random() >= 0.01:
            return await stepping
        task = asyncio.create_task(stepping)
        await asyncio.wait([task], timeout=self.rng.random() * 0.01)
        if not task.done():
            self.world.count("caller cancelled")
            task.cancel()
            await asyncio.wait([task])
        if task.cancelled():
            return await self.policy.step(observe(*seen), episode_start=begins)
        return task.result()

    async def close(self) -> None:
        if self._chain is not None:
            self.world.closed_ids.add(self._chain.session_id)
        await self.policy.close()


class ManyEnvs(Player):
    """Environments that step together."""

    def __init__(self, world: Any, name: str, *, stream: bool) -> None:
        super().__init__(world, name)
        self._n = self.num_sessions = self.rng.randint(2, 24)
        self.policy = SimulatedVectorPolicy(self.address, self._n, self.options(), stream=stream, token=self.token)
        self._chains: list[Chain | None] = [None] * self._n
        self._unsettled: dict[int, tuple[int, int]] = {}
        """As OneEnv's, by row."""

    def chains(self) -> Iterable[Chain]:
        ids = self.policy.session_ids
        return [c for c in self._chains if c is not None and c.session_id in ids]

    async def _step(self) -> None:
        n, world = self._n, self.world
        seen = [self.seen() for _ in range(n)]
        begins = np.array([self.begins() for _ in range(n)])
        todo = np.array([self.rng.random() < 0.9 for _ in range(n)])
        since_s, num_downs = world.loop.now_s, world.num_downs
        while todo.any():
            observations = np.stack([observe(*s) for s in seen])
            try:
                result = await self.policy.step(observations, episode_starts=begins, mask=todo, raise_errors=False)
            except TenutoError as error:
                self._failed(error)
                await asyncio.sleep(self.rng.random() * 0.1)
                continue
            for row in np.flatnonzero(todo).tolist():
                error = result.errors.get(row)
                if isinstance(error, SessionGoneError):
                    world.laws.lost(self._chains[row], error)
                    self._chains[row] = None
                    begins[row] = True
                elif error is not None:
                    self._failed(error)
                    if isinstance(error, VersionUnknownError) and world.has_swapped and not begins[row]:
                        if error.outcome_unknown:
                            self._unsettled[row] = seen[row]
                        begins[row] = True
                else:
                    self._took(row, seen[row], bool(begins[row]), since_s, num_downs, result)
                    todo[row] = False
            if result.errors:
                await asyncio.sleep(self.rng.random() * 0.1)

    def _failed(self, error: TenutoError) -> None:
        self.world.trace("failed", self.name, type(error).__name__)
        if not isinstance(error, _PASSES):
            self.world.laws.broken(laws.ERROR, f"{self.name}: {error!r}")

    def _took(self, row: int, seen: tuple[int, int], begins: bool, since_s: float, num_downs: int, result: Any) -> None:
        session_id = self.policy.session_ids[row]
        chain = self._chains[row]
        if chain is not None and chain.session_id != session_id:
            self.world.laws.lost(chain, None, "replaced at an episode's start")
            chain = None
        if chain is None:
            chain = self._chains[row] = Chain(session_id, session_id, num_downs=num_downs, born_s=since_s)
        unsettled = self._unsettled.pop(row, None)
        if unsettled is not None and chain.index and int(result.step_indices[row]) == chain.index + 1:
            chain.apply(unsettled, False, [])
        self.world.laws.stepped(
            chain, seen, begins, since_s, index=int(result.step_indices[row]), version=int(result.versions[row]),
            action=int(result.actions[row]), value=float(result.values[row]),
            durable=None if result.durable_steps is None else int(result.durable_steps[row]),
        )  # fmt: skip

    async def close(self) -> None:
        self.world.closed_ids.update(self.policy.session_ids)
        await self.policy.close()
