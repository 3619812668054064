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

    def __init__(self, like: Tensor, sizes: Sizes, *, keep: bool) -> None:
        """``like`` says device and dtype. Without ``keep`` only the states last: every step writes over the others."""
        self.sizes = sizes
        num_steps, num_rows, hidden, cells, width, heads = sizes

        def states(*shape: int) -> Tensor:
            return like.new_empty((num_steps + 1, num_rows, *shape))

        def values(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
            if keep:
                return like.new_empty((num_steps, *shape), dtype=dtype)
            return like.new_empty(shape, dtype=dtype).expand(num_steps, *shape)

        # States: T + 1 of each.
        self.carried = states(heads * width + hidden)  # [read_vectors, h]
        self.c = states(hidden)
        self.memory = states(cells, width)
        self.cell_norms = states(cells)
        self.link = states(cells, cells)
        self.precedence = states(cells)
        self.reads = states(heads, cells)
        self.write = states(cells)
        self.usage = states(cells)
        # The controller: activated gates (i, f, g, o) and tanh(c).
        self.gates = values(num_rows, 4 * hidden)
        self.tanh_c = values(num_rows, hidden)
        # The activated interface, in the order of `interface_order`.
        self.interface = values(num_rows, (heads + 2) * width + width + heads + 2 + (heads + 1) + 3 * heads)
        self.key_norms = values(num_rows, heads + 1)
        # Usage and allocation.
        self.kept = values(num_rows, heads, cells)  # 1 - f_r R_r
        self.retention = values(num_rows, cells)
        self.grown = values(num_rows, cells)  # usage after writing, before freeing
        self.ascending = values(num_rows, cells)
        self.order = values(num_rows, cells, dtype=torch.int64)
        self.before = values(num_rows, cells)
        (self.before if keep else self.before[:1])[:, :, 0] = 1  # Nothing is before the emptiest cell.
        self.allocation = values(num_rows, cells)
        # Writing: index 0 of a head dimension of size 1 is the write head.
        self.write_denominator, self.write_cosine, self.write_content = (values(num_rows, 1, cells) for _ in range(3))
        self.mix = values(num_rows, cells)
        self.change = values(num_rows, cells, width)  # v - e M
        self.shrink = values(num_rows, cells, cells)  # 1 - ww_i - ww_j
        self.unwritten = values(num_rows, 1)  # 1 - Σ ww
        # Reading: directions are (backward, forward, content), in front of the rows.
        self.read_denominator, self.read_cosine = (values(num_rows, heads, cells) for _ in range(2))
        self.directions = values(3, num_rows, heads, cells)
        self.modes = values(3, num_rows, heads)

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
