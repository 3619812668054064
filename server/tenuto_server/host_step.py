"""A version's step on the CPU: one call into compiled code, straight on the arena's memory."""

from __future__ import annotations

import time
from math import inf

from tenuto_models.compiled import CompiledStep
from tenuto_server.arena import StateArena
from tenuto_server.step import StepResults, StepRows

_MAX_BRIEF_ROWS = 64
"""Larger batches wait on a thread of their own, and are shared among several."""
_WEIGHT = 0.1
"""Of the last batch in the mean."""


class HostStep:
    """An engine's Step. Any number of rows is as good as any other: nothing is padded."""

    sizes: tuple[int, ...] = (1,)

    def __init__(self, compiled: CompiledStep, arena: StateArena) -> None:
        self._compiled = compiled
        self._state, self._counters = arena.on_host()
        self._took_s = [inf] * (_MAX_BRIEF_ROWS + 1)
        """By the number of rows, a running mean."""

    def expected_s(self, num_rows: int) -> float:
        """See Step: what batches of this size took so far."""
        return self._took_s[num_rows] if num_rows <= _MAX_BRIEF_ROWS else inf

    def advance(self, rows: StepRows) -> StepResults:
        """See Step."""
        began_s = time.perf_counter()
        chosen = self._compiled.advance(
            self._state, self._counters, rows.slots, rows.episode_starts, rows.observations, rows.seeds,
            rows.step_indices, rows.deterministic,
        )  # fmt: skip
        gather_s, run_s, scatter_s = chosen.seconds
        if (n := len(rows)) <= _MAX_BRIEF_ROWS:
            took_s, before_s = time.perf_counter() - began_s, self._took_s[n]
            self._took_s[n] = took_s if before_s == inf else before_s + _WEIGHT * (took_s - before_s)
        return StepResults(
            rows, chosen.actions, chosen.values, chosen.log_probs, chosen.logits, chosen.finite,
            {"gather": gather_s, "run": run_s, "scatter": scatter_s},
        )  # fmt: skip
