"""Runs gymnasium environments against a remote policy: observations out, actions in, rewards with the next step.

Environments are reset one by one, not by a gymnasium vector environment: so an episode's first observation is sent
exactly once, and the reward of its last action travels with the first step of the next, or with the session's close.
N is the number of environments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tenuto_client.errors import (
    CapacityError,
    DeadlineError,
    DrainingError,
    OverloadedError,
    PolicyUnknownError,
    ServerUnavailableError,
    SessionGoneError,
    SpaceMismatchError,
    StepInFlightError,
    TenutoError,
)
from tenuto_client.results import VectorStepResult
from tenuto_client.statistics import PlayStatistics
from tenuto_client.vector_policy import RemoteVectorPolicy
from tenuto_client.view import View

if TYPE_CHECKING:
    import gymnasium

MAY_PASS = (
    ServerUnavailableError,
    DeadlineError,
    OverloadedError,
    CapacityError,
    PolicyUnknownError,
    StepInFlightError,
)
"""What a server that restarts, drains or is busy answers for a while."""
RETRY_PAUSE_S = 0.5
"""Before environments that the server did not serve ask again; the others go on meanwhile."""


class Player:
    """Plays episodes in N environments until enough are finished. Owns the environments' state, not the policy."""

    def __init__(
        self,
        envs: Sequence[gymnasium.Env[Any, Any]],
        policy: RemoteVectorPolicy,
        *,
        num_episodes: int = 0,
        seed: int | None = None,
        patience_s: float = 30.0,
        statistics: PlayStatistics | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``num_episodes``: 0 for endless. ``patience_s``: how long the server may be away before that is an error.
        ``statistics``: filled while playing; None: new ones.

        Raises SpaceMismatchError where the environments' spaces are not the policy's.
        """
        from gymnasium import spaces
        from gymnasium.vector.utils import create_empty_array

        check_spaces(envs[0], policy)
        self.statistics = statistics or PlayStatistics()
        self._envs, self._policy, self._num_episodes = envs, policy, num_episodes
        self._patience_s, self._clock, self._sleep = patience_s, clock, sleep
        self._space = envs[0].observation_space
        self._is_discrete = isinstance(envs[0].action_space, spaces.Discrete)
        n = len(envs)
        self._observations: list[Any] = [None] * n
        self._stacked = create_empty_array(self._space, n)
        self._num_started = 0
        self._active = np.zeros(n, np.bool_)
        self._starts = np.zeros(n, np.bool_)
        self.last_rewards = np.full(n, np.nan, np.float32)
        """``[N]``: rewards of last actions, for the next step to carry."""
        self._returns = np.zeros(n)
        self._away = np.zeros(n, np.bool_)
        """Rows that the server did not serve."""
        self._seen_s = self._retry_at_s = 0.0
        """When the server last did something for this player, or said that it drains; when to ask it again."""
        for row in range(n):
            self._begin(row, None if seed is None else seed + row)

    def final_rewards(self) -> NDArray[np.float32]:
        """Rewards ``[N]`` to close the sessions with: of the actions that ended their episodes, NaN in mid-episode."""
        return np.where(self._starts, self.last_rewards, np.float32(np.nan))

    def play(self, view: View, should_stop: Callable[[], bool] = lambda: False) -> PlayStatistics:
        """Play until enough episodes are finished or ``should_stop``. Raises TenutoError where that is not possible."""
        self._seen_s = self._clock()
        while self._active.any() and not should_stop():
            result = self._step(self._rows_to_step())
            self._take_errors(result, view)
            for row in np.flatnonzero(result.versions).tolist():
                self._advance(row, result)
            view.update(lambda: self.statistics.line(self._clock()))
        return self.statistics

    def _rows_to_step(self) -> NDArray[np.bool_]:
        """Leave rows that are away alone for a while; sleep where there are no others."""
        if not self._away.any():
            return self._active
        present = self._active & ~self._away
        pause_s = self._retry_at_s - self._clock()
        if pause_s > 0 and present.any():
            return present
        if pause_s > 0:
            self._sleep(pause_s)
        return self._active

    def _step(self, mask: NDArray[np.bool_]) -> VectorStepResult:
        from gymnasium.vector.utils import concatenate

        began_s = self._clock()
        result = self._policy.step(
            concatenate(self._space, self._observations, self._stacked),
            episode_starts=self._starts,
            rewards=self.last_rewards,
            mask=mask,
            raise_errors=False,
        )
        now_s = self._clock()
        num_rows = int(np.count_nonzero(result.versions))
        if num_rows:
            self.statistics.add_step(now_s, now_s - began_s, num_rows, int(result.versions.max()))
        return result

    def _advance(self, row: int, result: VectorStepResult) -> None:
        """Act in one environment; begin its next episode where this one has ended."""
        action = result.actions[row]
        observation, reward, terminated, truncated, _ = self._envs[row].step(
            int(action) if self._is_discrete else action
        )
        self._observations[row], self._starts[row] = observation, False
        self.last_rewards[row] = float(reward)
        self._returns[row] += float(reward)
        if terminated or truncated:
            self.statistics.add_episode(int(result.versions[row]), float(self._returns[row]))
            self._begin(row, None)

    def _begin(self, row: int, seed: int | None) -> None:
        """Begin an episode; let the environment rest where enough have begun."""
        self._active[row] = not self._num_episodes or self._num_started < self._num_episodes
        if self._active[row] or self._observations[row] is None:
            self._observations[row], _ = self._envs[row].reset(seed=seed)
        self._num_started += int(self._active[row])
        self._starts[row], self._returns[row] = True, 0.0

    def _take_errors(self, result: VectorStepResult, view: View) -> None:
        """Restart lost episodes; let rows rest that may step later; raise the other errors."""
        lost = {row: error for row, error in result.errors.items() if isinstance(error, SessionGoneError)}
        away = {row: error for row, error in result.errors.items() if isinstance(error, MAY_PASS)}
        for row, error in result.errors.items():
            if row not in lost and row not in away:
                raise error
        if lost:
            view.note(f"{len(lost)} episodes lost, they begin anew: {next(iter(lost.values()))}")
            self.statistics.num_interrupted += len(lost)
            self._num_started -= len(lost)
            for row in lost:
                self.last_rewards[row] = np.nan
                self._begin(row, None)
        now_s = self._clock()
        # A draining server is there as long as it says so; what is waited for is its successor.
        if lost or result.versions.any() or any(isinstance(error, DrainingError) for error in away.values()):
            self._seen_s = now_s
        if away:
            error = next(iter(away.values()))
            if now_s - self._seen_s > self._patience_s:
                raise give_up(error, self._patience_s)
            if not self._away.any():
                view.note(f"{len(away)} environments wait for the server, at most {self._patience_s:g} s: {error}")
            self._retry_at_s = now_s + RETRY_PAUSE_S
        self._away[result.versions > 0] = False
        self._away[list(lost)] = False
        self._away[list(away)] = True
        self.statistics.num_away = int(np.count_nonzero(self._away))


def give_up(error: TenutoError, patience_s: float) -> TenutoError:
    """Say in an error's text how long the server was away. Modifies and returns the error."""
    error.args = (f"{error}; the server did not come back within {patience_s:g} s", *error.args[1:])
    return error


def check_spaces(env: gymnasium.Env[Any, Any], policy: RemoteVectorPolicy) -> None:
    """Raise SpaceMismatchError where the environment's spaces are not the policy's."""
    for what, got, expected in (
        ("observation space", env.observation_space, policy.observation_space),
        ("action space", env.action_space, policy.action_space),
    ):
        if got != expected:
            raise SpaceMismatchError(
                f"{what}: got {got} from the environment, expected {expected} by policy {policy.served.policy_name!r}"
            )
