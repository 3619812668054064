"""A version's step on the CPU: one call into compiled code, straight on the arena's memory."""

from __future__ import annotations

from tenuto_models.compiled import CompiledStep
from tenuto_server.arena import StateArena
from tenuto_server.step import StepResults, StepRows


class HostStep:
    """An engine's Step. Any number of rows is as good as any other: nothing is padded."""

    sizes: tuple[int, ...] = (1,)

    def __init__(self, compiled: CompiledStep, arena: StateArena) -> None:
        self._compiled = compiled
        self._state, self._counters = arena.on_host()

    def advance(self, rows: StepRows) -> StepResults:
        """See Step."""
        chosen = self._compiled.advance(
            self._state, self._counters, rows.slots, rows.episode_starts, rows.observations, rows.seeds,
            rows.step_indices, rows.deterministic,
        )  # fmt: skip
        gather_s, run_s, scatter_s = chosen.seconds
        return StepResults(
            rows, chosen.actions, chosen.values, chosen.log_probs, chosen.logits, chosen.finite,
            {"gather": gather_s, "run": run_s, "scatter": scatter_s},
        )  # fmt: skip
