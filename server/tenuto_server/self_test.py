"""The start-up self-test: do a session's results depend on who shares its batches, on the device that serves it?

A memory carries the smallest difference on, so a difference of one bit is a failure. What is compared is what a session
is told and what it remembers, after every one of a few steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tenuto_models import Policy
from tenuto_server.arena import StateArena
from tenuto_server.engine import Engine
from tenuto_server.step import Step, StepRows

_STEPS = 3
"""So that the memory is no longer empty, and its content matters."""
_COMPARED = 32
"""Sessions whose batches are cut up."""


class SelfTest:
    """Steps the same sessions in batches of many sizes, each in many places. Run by the engine's thread, in an arena of
    its own.
    """

    def __init__(self, engine: Engine, policy: Policy, max_batch: int) -> None:
        self._engine, self._policy, self._max_batch = engine, policy, max_batch
        rows = max(max_batch, _COMPARED)
        self._arena = StateArena(policy.state_spec, rows, engine.device)
        self._random = np.random.default_rng(0)
        shape = (_STEPS, rows, policy.observation_size)
        self._observations = self._random.uniform(-1, 1, shape).astype(np.float32)

    async def spread(self) -> float:
        """Return by how much results differed at most; 0 where they were the same bits.

        The engine computes one size after the other, and the steps of others in between.
        """
        step = await self._engine.call(lambda: self._engine.make_step(self._policy, self._arena))
        # The largest batch first, with which the others are compared.
        whole, *others = dict.fromkeys((self._max_batch, 1, 2, 3, 5, 7, 13, *step.sizes))
        expected, spread = await self._engine.call(lambda: self._play(step, whole)), 0.0
        for size in others:
            found = await self._engine.call(lambda size=size: self._play(step, min(size, self._max_batch)))
            spread = max(spread, _difference(np.concatenate(found, 1), np.concatenate(expected, 1)))
        return spread

    def _play(self, step: Step, size: int) -> list[NDArray[np.float64]]:
        """Per step, what the first sessions were told and what they remember: ``[sessions, numbers]``."""
        n = max(size, _COMPARED)
        told: list[NDArray[np.float64]] = []
        for index in range(_STEPS):
            order = self._random.permutation(n)
            parts = [order[first : first + size] for first in range(0, n, size)]
            results = [step.advance(self._rows(slots, index)) for slots in parts]
            outputs = np.concatenate([np.column_stack([r.logits, r.values, r.log_probs]) for r in results])
            told.append(outputs[np.argsort(order)][:_COMPARED].astype(np.float64))
            states = [self._arena.read(slot) for slot in range(_COMPARED)]
            told.append(np.array([np.concatenate([t.ravel().astype(np.float64) for t in s.values()]) for s in states]))
        return told

    def _rows(self, slots: NDArray[np.int64], index: int) -> StepRows:
        n = len(slots)
        return StepRows(
            slots=slots,
            generations=np.zeros(n, np.int64),
            observations=self._observations[index, slots],
            episode_starts=np.full(n, index == 0),
            seeds=slots.astype(np.uint64),
            step_indices=np.full(n, index, np.uint64),
            deterministic=np.zeros(n, np.bool_),
            rewards=np.zeros(n, np.float32),
            session_ids=np.zeros(n, np.uint64),
        )


def _difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The largest between two arrays: 0 where both hold NaN, infinite where one does."""
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    different = (a != b) & ~(np.isnan(a) & np.isnan(b))
    return float(np.nan_to_num(np.abs(a[different] - b[different]), nan=np.inf).max())
