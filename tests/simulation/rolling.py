"""A policy whose memory is a digest of all that happened in the episode: a step that is lost, doubled, swapped, torn or
computed by other weights changes every action after it. As columns for the server, as plain integers for the laws.

Legend: n rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from simulation.loop import PROCESS
from tenuto_models.memory import TensorSpec, state_fingerprint
from tenuto_server.arena import StateArena
from tenuto_server.step import StepResults, StepRows

OBSERVATIONS = spaces.Box(-1e6, 1e6, (2,), np.float32)
ACTIONS = spaces.Discrete(2**24)
_MASK = 2**64 - 1
_A, _B, _C, _D = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93
_U = {x: np.uint64(x) for x in (_A, _B, _C, _D, 30, 27, 31)}


@dataclass(frozen=True)
class Weights:
    """What a version computes with."""

    number: int
    layout: str = "h"
    """Name of its memory: another one makes another fingerprint."""

    @property
    def code(self) -> int:
        """What tells it from all others."""
        return 2 * self.number + (self.layout != "h")

    @property
    def sha256(self) -> str:
        """As a checkpoint's."""
        return f"{self.number:064x}"


def _mix(x: int) -> int:
    x = (x + _A) & _MASK
    x = ((x ^ (x >> 30)) * _B) & _MASK
    x = ((x ^ (x >> 27)) * _C) & _MASK
    return x ^ (x >> 31)


def _mix_columns(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + _U[_A]
    x = (x ^ (x >> _U[30])) * _U[_B]
    x = (x ^ (x >> _U[27])) * _U[_C]
    return x ^ (x >> _U[31])


def observe(first: int, second: int) -> NDArray[np.float32]:
    """Two whole numbers as an observation."""
    return np.array([first, second], np.float32)


def advance(memory: int, observation: tuple[int, int], seed: int, index: int, weights: Weights, greedy: bool) -> int:
    """The memory after a step."""
    seen = (observation[0] * 2**20 + observation[1]) & _MASK
    where = (seed * _B + index * _C + (2 * weights.code + greedy) * _D) & _MASK
    return _mix((_mix((memory + seen * _A) & _MASK) + where) & _MASK)


def action_of(memory: int) -> int:
    return memory >> 40


def value_of(memory: int) -> float:
    return float((memory >> 20) & 0xFFFF)


class RollingPolicy:
    """What the server asks of a policy."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.observation_space, self.action_space = OBSERVATIONS, ACTIONS
        self.state_spec = (TensorSpec(weights.layout, (1,), torch.int64), TensorSpec("t", (1,), torch.int64))
        self.state_fingerprint = state_fingerprint(self.state_spec)
        self.distribution = SimpleNamespace(num_logits=2)
        self.observation_size = 2


class RollingStep:
    """An engine's Step over the production arena."""

    sizes: tuple[int, ...] = (1,)

    def __init__(self, policy: RollingPolicy, arena: StateArena, world: Any) -> None:
        self._weights, self._arena, self._world = policy.weights, arena, world
        self._layout = policy.weights.layout

    def expected_s(self, num_rows: int) -> float:
        return self._world.expected_s()

    def advance(self, rows: StepRows) -> StepResults:
        n, world = len(rows), self._world
        process = PROCESS.get()
        is_real = n > 1 or int(rows.slots[0]) != self._arena.spare
        if is_real:
            world.laws.batch(process, rows)
        slots = torch.from_numpy(rows.slots)
        state = self._arena.gather(slots, torch.from_numpy(rows.episode_starts))
        memory = state[self._layout].numpy().reshape(n).view(np.uint64)
        seen = rows.observations.astype(np.int64).view(np.uint64)
        seen = seen[:, 0] * np.uint64(2**20) + seen[:, 1]
        mode = rows.deterministic + np.uint64(2 * self._weights.code)
        where = rows.seeds * _U[_B] + rows.step_indices * _U[_C] + mode * _U[_D]
        after = _mix_columns(_mix_columns(memory + seen * _U[_A]) + where)
        finite = world.finite_rows(n) if is_real else np.ones(n, np.bool_)
        if is_real:
            world.failpoint("before_scatter")
        new = {self._layout: torch.from_numpy(after.view(np.int64)).unsqueeze(1), "t": state["t"] + 1}
        self._arena.scatter(slots, new, torch.from_numpy(finite))
        if is_real:
            world.laws.applied(process, rows, finite)
            world.failpoint("after_scatter")
        values = ((after >> np.uint64(20)) & np.uint64(0xFFFF)).astype(np.float32)
        return StepResults(
            rows, (after >> np.uint64(40)).astype(np.int64), values, -values, np.stack([values, -values], 1), finite,
            {"gather": 0.0, "run": 0.0, "scatter": 0.0},
        )  # fmt: skip
