"""Many environments that play at once, on every kind of client, and remember what they were told to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tenuto_client import AsyncRemotePolicy, AsyncRemoteVectorPolicy
from tenuto_envs import make

ENVIRONMENTS = {
    "cartpole": "popgym-PositionOnlyCartPoleEasy-v0",
    "repeat": "popgym-RepeatPreviousEasy-v0",
    "count": "popgym-CountRecallEasy-v0",
}
"""Policy -> what it plays. In the first each action moves all that comes after it."""
_ROWS = 8
"""Environments of a vector policy."""
_PATIENCE_S = 180.0


@dataclass
class Player:
    """One environment, from its first step to its last."""

    number: int
    policy_name: str
    transport: str
    """unary, stream, or vector: together with others."""
    actions: list[int] = field(default_factory=lambda: [])
    session_id: int = 0
    longest_pause_s: float = 0.0
    """Between two of its actions."""
    began_s: float = 0.0
    """When its last action came."""

    def start(self) -> Any:
        """Make the environment and return its first observation."""
        self._env = make(ENVIRONMENTS[self.policy_name])
        self._episode, self.began_s = 0, time.monotonic()
        return self._reset()

    def _reset(self) -> Any:
        self._episode += 1
        return self._env.reset(seed=1000 * self.number + self._episode)[0]

    def act(self, action: Any) -> tuple[Any, bool, float]:
        """Do what the policy says: the next observation, whether an episode begins with it, and the reward."""
        now_s = time.monotonic()
        self.longest_pause_s, self.began_s = max(self.longest_pause_s, now_s - self.began_s), now_s
        self.actions.append(int(action))
        observation, reward, terminated, truncated, _ = self._env.step(action)
        ends = bool(terminated or truncated)
        return self._reset() if ends else observation, ends, float(reward)


class Fleet:
    """Environments that all take the same number of steps."""

    def __init__(self, num_environments: int, num_steps: int) -> None:
        self.num_steps = num_steps
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_calm = asyncio.Event()
        names = list(ENVIRONMENTS)
        # A half on a shared stream, a quarter unary, a quarter in vectors.
        kinds = ("stream", "unary", "stream", "vector")
        self.players = [Player(i, names[i // 4 % len(names)], kinds[i % 4]) for i in range(num_environments)]

    @property
    def num_done(self) -> int:
        """Steps so far, of all environments."""
        return sum(len(player.actions) for player in self.players)

    @property
    def total(self) -> int:
        """Steps when all are done."""
        return self.num_steps * len(self.players)

    def let_finish(self) -> None:
        """From now on nothing will undo a step: let each environment take its last. Called from any thread."""
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(self._is_calm.set)

    async def play(self, address: str, *, is_calm: bool) -> None:
        """Play all environments at once. Where it is not calm, the last step of each is taken when it is.

        Raises what the first of them to fail has raised.
        """
        self._loop = asyncio.get_running_loop()
        if is_calm:
            self._is_calm.set()
        vectors: dict[str, list[Player]] = {}
        for player in self.players:
            if player.transport == "vector":
                vectors.setdefault(player.policy_name, []).append(player)
        groups = [v[i : i + _ROWS] for v in vectors.values() for i in range(0, len(v), _ROWS)]
        singles = [p for p in self.players if p.transport != "vector"]
        playing = [asyncio.ensure_future(self._play(address, p)) for p in singles]
        playing += [asyncio.ensure_future(self._play_together(address, g)) for g in groups]
        try:
            await asyncio.gather(*playing)
        finally:
            self._loop = None
            for task in playing:
                task.cancel()
            await asyncio.gather(*playing, return_exceptions=True)

    async def _play(self, address: str, player: Player) -> None:
        policy = AsyncRemotePolicy(
            address, player.policy_name, seed=player.number, timeout_s=_PATIENCE_S, outputs=(),
            transport="stream" if player.transport == "stream" else "unary",
        )  # fmt: skip
        observation, begins, reward = player.start(), True, None
        try:
            while len(player.actions) < self.num_steps:
                if len(player.actions) == self.num_steps - 1:
                    await self._wait_for_calm([player])
                result = await policy.step(observation, episode_start=begins, reward=reward)
                assert result.step_index == len(player.actions), "a step was lost or doubled"
                player.session_id = policy.session_id
                observation, begins, reward = player.act(result.action)
        finally:
            # The session stays, for those who want to count its steps.
            await policy._transport.close()  # pyright: ignore[reportPrivateUsage]

    async def _wait_for_calm(self, players: Sequence[Player]) -> None:
        await self._is_calm.wait()
        for player in players:
            # That was no pause of the server's.
            player.began_s = time.monotonic()

    async def _play_together(self, address: str, players: Sequence[Player]) -> None:
        # Row i of a vector policy has the seed + i.
        policy = AsyncRemoteVectorPolicy(
            address, len(players), players[0].policy_name, seed=players[0].number, timeout_s=_PATIENCE_S, outputs=()
        )
        now = [(player.start(), True, np.nan) for player in players]
        try:
            for index in range(self.num_steps):
                if index == self.num_steps - 1:
                    await self._wait_for_calm(players)
                observations = _stacked([observation for observation, _, _ in now])
                starts, rewards = ([row[column] for row in now] for column in (1, 2))
                result = await policy.step(observations, episode_starts=starts, rewards=rewards)
                assert set(result.step_indices.tolist()) == {index}, "a step was lost or doubled"
                for player, session_id in zip(players, policy.session_ids, strict=True):
                    player.session_id = session_id
                now = [player.act(action) for player, action in zip(players, result.actions, strict=True)]
        finally:
            await policy._transport.close()  # pyright: ignore[reportPrivateUsage]


def _stacked(observations: Sequence[Any]) -> Any:
    """N observations in the layout of gymnasium's vector environments."""
    if isinstance(observations[0], tuple):
        return tuple(_stacked(column) for column in zip(*observations, strict=True))
    return np.stack(observations)
