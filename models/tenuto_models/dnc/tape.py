"""What a forward scan of the DNC leaves behind: every value that its reverse scan or the caller needs.

Legend: T time steps, B rows, H controller size, R read heads, W cell size, N memory cells. Everything is time-major.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """T, B, H, N, W and R of the legend."""

    num_steps: int
    num_rows: int
    hidden: int
    cells: int
    width: int
    heads: int


class Tape:
    """Every value of a forward scan that the reverse scan or the caller needs. Index 0 of a state is before step 0."""

    def __init__(self, like: Tensor, sizes: Sizes) -> None:
        """``like`` says device and dtype."""
        self.sizes = sizes
        num_steps, num_rows, hidden, cells, width, heads = sizes

        def empty(steps: int, *shape: int) -> Tensor:
            return like.new_empty((steps, num_rows, *shape))

        # States: T + 1 of each.
        self.carried = empty(num_steps + 1, heads * width + hidden)  # [read_vectors, h]
        self.c = empty(num_steps + 1, hidden)
        self.memory = empty(num_steps + 1, cells, width)
        self.cell_norms = empty(num_steps + 1, cells)
        self.link = empty(num_steps + 1, cells, cells)
        self.precedence = empty(num_steps + 1, cells)
        self.reads = empty(num_steps + 1, heads, cells)
        self.write = empty(num_steps + 1, cells)
        self.usage = empty(num_steps + 1, cells)
        # The controller: activated gates (i, f, g, o) and tanh(c).
        self.gates = empty(num_steps, 4 * hidden)
        self.tanh_c = empty(num_steps, hidden)
        # The activated interface, in the order of `interface_order`.
        self.interface = empty(num_steps, (heads + 2) * width + width + heads + 2 + (heads + 1) + 3 * heads)
        self.key_norms = empty(num_steps, heads + 1)
        # Usage and allocation.
        self.kept = empty(num_steps, heads, cells)  # 1 - f_r R_r
        self.retention = empty(num_steps, cells)
        self.grown = empty(num_steps, cells)  # usage after writing, before freeing
        self.ascending = empty(num_steps, cells)
        self.order = torch.empty_like(self.ascending, dtype=torch.int64)
        self.before = empty(num_steps, cells)
        self.allocation = empty(num_steps, cells)
        # Writing: index 0 of a head dimension of size 1 is the write head.
        self.write_denominator, self.write_cosine, self.write_content = (empty(num_steps, 1, cells) for _ in range(3))
        self.mix = empty(num_steps, cells)
        self.change = empty(num_steps, cells, width)  # v - e M
        self.shrink = empty(num_steps, cells, cells)  # 1 - ww_i - ww_j
        self.unwritten = empty(num_steps, 1)  # 1 - Σ ww
        # Reading: directions are (backward, forward, content), in front of the rows.
        self.read_denominator, self.read_cosine = (empty(num_steps, heads, cells) for _ in range(2))
        self.directions = like.new_empty((num_steps, 3, num_rows, heads, cells))
        self.modes = like.new_empty((num_steps, 3, num_rows, heads))

    def cut(self, interface: Tensor) -> dict[str, Tensor]:
        """Name the parts of an interface tensor ``[T, B, I]`` in the order of :func:`interface_order`, as views."""
        width, heads = self.sizes.width, self.sizes.heads
        sizes = {
            "keys": (heads + 1) * width, "write_vector": width, "erase": width, "free": heads, "allocation_gate": 1,
            "write_gate": 1, "strengths": heads + 1, "modes": 3 * heads,
        }  # fmt: skip
        parts = dict(zip(sizes, interface.split(list(sizes.values()), dim=2), strict=True))
        parts["keys"] = parts["keys"].unflatten(2, (heads + 1, width))
        parts["modes"] = parts["modes"].unflatten(2, (3, heads)).transpose(1, 2)
        ends = list(accumulate(sizes.values()))
        parts["tanh"], parts["sigmoid"] = interface[..., : ends[1]], interface[..., ends[1] : ends[5]]
        parts["pointwise"] = interface[..., : ends[6]]
        return parts


def interface_order(heads: int, width: int) -> Tensor:
    """Rows of the interface layer, regrouped by activation: tanh, sigmoid, softplus, softmax."""
    sizes = [heads * width, heads, width, 1, width, width, heads, 1, 1, 3 * heads]
    (read_keys, read_strengths, write_key, write_strength, erase, write_vector, free, allocation_gate, write_gate,
     modes) = torch.arange(sum(sizes)).split(sizes)  # fmt: skip
    modes = modes.view(heads, 3).t().flatten()
    return torch.cat([
        read_keys, write_key, write_vector, erase, free, allocation_gate, write_gate, read_strengths, write_strength,
        modes,
    ])  # fmt: skip
