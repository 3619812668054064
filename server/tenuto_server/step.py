"""What goes into a step of many sessions, what comes out of it, and who computes it.

Legend: n rows of a batch; O flattened observation; K logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tenuto_server.arena import Slots


@dataclass(eq=False)
class StepRows:
    """The rows of one or more tickets, as columns."""

    slots: Slots
    generations: NDArray[np.int64]
    observations: NDArray[np.float32]
    """[n, O]"""
    episode_starts: NDArray[np.bool_]
    seeds: NDArray[np.uint64]
    step_indices: NDArray[np.uint64]
    deterministic: NDArray[np.bool_]
    rewards: NDArray[np.float32]
    """Not used by the engine; NaN where not known."""
    session_ids: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.slots)

    @staticmethod
    def concatenate(parts: Sequence[StepRows]) -> StepRows:
        """Stack the rows of several tickets in order."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(vars(p).values() for p in parts), strict=True)
        return StepRows(*(np.concatenate(column) for column in columns))


@dataclass(eq=False, slots=True)
class StepResults:
    """What a batch came to, on the host."""

    rows: StepRows
    actions: NDArray[Any]
    """[n, *action shape]"""
    values: NDArray[np.float32]
    log_probs: NDArray[np.float32]
    logits: NDArray[np.float32]
    """[n, K]"""
    finite: NDArray[np.bool_]
    """Rows whose logits, value and log-probability are finite; the others were not applied."""
    station_s: dict[str, float]
    """Seconds spent in gather, run and scatter."""


class Step(Protocol):
    """Computes the batches of one version over its policy's arena. Called by one thread at a time."""

    sizes: tuple[int, ...]
    """Numbers of rows that it has code of its own for, ascending; the first batch of such a size may be slow."""

    def expected_s(self, num_rows: int) -> float:
        """Seconds for which a batch of so many rows would keep its thread busy, on average; infinity where that is not
        known, and where it would wait.
        """
        ...

    def advance(self, rows: StepRows) -> StepResults:
        """Advance every row by one step, in the arena. The state of a row with non-finite results stays as it was."""
        ...
