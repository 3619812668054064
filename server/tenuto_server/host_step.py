"""A version's step on the CPU: one call into compiled code, straight on the arena's memory."""

from __future__ import annotations

from math import inf

from tenuto_models.compiled import CompiledStep
from tenuto_server.arena import StateArena
from tenuto_server.step import StepResults, StepRows


class HostStep:
    """An engine's Step. Any number of rows is as good as any other: nothing is padded."""

    sizes: tuple[int, ...] = (1,)

    def __init__(self, compiled: CompiledStep, arena: StateArena) -> None:
        self._compiled = compiled
        self._state, self._counters = arena.on_host()
        self._took_s = [inf] * 64
        """By the bits of the number of rows."""

    def expected_s(self, num_rows: int) -> float:
        """See Step: what batches of about this size took so far."""
        return self._took_s[num_rows.bit_length()]

    def advance(self, rows: StepRows) -> StepResults:
        """See Step."""
        chosen = self._compiled.advance(
            self._state, self._counters, rows.slots, rows.episode_starts, rows.observations, rows.seeds,
            rows.step_indices, rows.deterministic,
        )  # fmt: skip
        gather_s, run_s, scatter_s = chosen.seconds
        size, took_s = len(rows).bit_length(), gather_s + run_s + scatter_s
        # The least, forgotten slowly: what a batch took may have in it what else the machine did.
        self._took_s[size] = min(took_s, 1.1 * self._took_s[size])
        return StepResults(
            rows, chosen.actions, chosen.values, chosen.log_probs, chosen.logits, chosen.finite,
            {"gather": gather_s, "run": run_s, "scatter": scatter_s},
        )  # fmt: skip
