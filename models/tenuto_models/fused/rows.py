"""Sessions' state where it lies: kernels that read a row by its slot, and one that stores the rows of a batch.

Legend: B rows of a batch, C capacity, S state size, F input features, K frames. The state is a float32 matrix
``[C + 1, S]``; its last row, the spare, is the place of a batch's padding and is not written here.
"""

# pyright: reportMissingParameterType=false
# Of kernels: pointers, which no annotation describes.

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenuto_models.fused.launch import launch
from tenuto_models.memory import State

_BLOCK = 1024
"""Values that one program of the store copies."""


class StateRows:
    """The state of a policy's sessions as matrices by dtype, used in place: what is gathered is where the rows are, and
    what is scattered are whole rows. Has the two calls of an arena that copies. Does not own the matrices.
    """

    def __init__(self, matrices: Mapping[torch.dtype, Tensor]) -> None:
        self.rows, self.counters = matrices[torch.float32], matrices[torch.int64]
        """``[C + 1, S]`` and the steps of the episode so far ``[C + 1, 1]``."""

    def gather(self, slots: Tensor, episode_starts: Tensor) -> dict[str, Tensor]:
        """Name the rows of ``slots [B]``, to be read as zero where ``episode_starts [B]``."""
        t = self.counters.index_select(0, slots).masked_fill_(episode_starts.unsqueeze(1), 0)
        return {"slots": slots, "episode_starts": episode_starts, "t": t}

    def scatter(self, slots: Tensor, state: State, keep: Tensor) -> None:
        """Store ``state["rows"] [B, S]`` and ``state["t"] [B, 1]`` at ``slots`` where ``keep [B]``; never padding."""
        after, width = state["rows"], self.rows.shape[1]
        launch(
            _store, (len(slots), triton.cdiv(width, _BLOCK)), after, state["t"], self.rows, self.counters, slots, keep,
            len(self.rows) - 1, WIDTH=width, STRIDE=after.stride(0), BLOCK=_BLOCK,
        )  # fmt: skip


def frames(z: Tensor, windows: Tensor, state: State) -> Tensor:
    """Append ``z [B, F]`` to the windows of a batch's slots, which stand in ``windows [C + 1, (K-1) F]``:
    ``[B, K F]``, oldest frame first.
    """
    (num_rows, features), kept = z.shape, windows.shape[1]
    x = z.new_empty((num_rows, kept + features))
    launch(
        _append, (num_rows,), z, windows, state["slots"], state["episode_starts"], x,
        KEPT=kept, FEATURES=features, BLOCK=triton.next_power_of_2(kept + features),
    )  # fmt: skip
    return x


@triton.jit
def _append(z, windows, slots, episode_starts, x, KEPT: tl.constexpr, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0)
    slot, begun = tl.load(slots + row), tl.load(episode_starts + row) == 0
    k = tl.arange(0, BLOCK)
    old = tl.load(windows + slot * KEPT + k, mask=(k < KEPT) & begun, other=0)
    new = tl.load(z + row * FEATURES + k - KEPT, mask=(k >= KEPT) & (k < KEPT + FEATURES), other=0)
    tl.store(x + row * (KEPT + FEATURES) + k, tl.where(k < KEPT, old, new), mask=k < KEPT + FEATURES)


@triton.jit
def _store(
    after, t, rows, counters, slots, keep, spare, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row and BLOCK of its columns."""
    row, block = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    kept = (tl.load(keep + row) != 0) & (slot != spare)
    k = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(rows + slot * WIDTH + k, tl.load(after + row * STRIDE + k, mask=k < WIDTH), mask=(k < WIDTH) & kept)
    tl.store(counters + slot, tl.load(t + row), mask=kept & (block == 0))
