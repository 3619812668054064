"""The DNC's operations between its matrix products as three kernels, which read a session's state by its slot.

:mod:`tenuto_models.dnc.addressing` has the equations in their plain form. Every row is computed by a program of its
own: what stands in the other rows, and how many they are, does not change a bit of it.

Legend: B rows of a batch, C capacity, F input features, H controller size, R read heads, W cell size, N memory cells, I
interface size, S state size. A state row holds ``h, c, read_vectors, memory, link_matrix, precedence, read_weights,
write_weights, usage_vector``. A kernel's N and W are the next powers of two; what is beyond the true sizes is masked.
"""

# pyright: reportMissingParameterType=false
# Of kernels: pointers, which no annotation describes.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, nn

from tenuto_models.dnc.core import DNCConfig, DNCCore
from tenuto_models.dnc.kernels import DELTA, Sizes
from tenuto_models.fused.launch import launch
from tenuto_models.memory import State

_DELTA = tl.constexpr(DELTA)
_VALUES_PER_WARP = 1024
"""Of one matrix, kept in registers; with four times as many, those of a warp do not suffice."""


class FusedDNC(nn.Module):
    """A DNC core, stepped over ``rows [C + 1, S]`` in place. Shares the layers of that core."""

    def __init__(self, core: DNCCore, config: DNCConfig, rows: Tensor) -> None:
        super().__init__()
        self.gates, self.interface, self.output = core.gates, core.access.interface, core.output
        self._rows = rows
        self._sizes = Sizes(config.hidden_size, config.num_cells, config.cell_size, config.num_read_heads)

    def step(self, z: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance one step: ``z [B, F]`` and where the state is -> ``(y [B, H], {"rows": [B, S] after it})``.

        Does not modify the rows in place: that is for who knows whether the results are finite.
        """
        (num_rows, inputs), (hidden, cells, width, heads) = z.shape, self._sizes
        before = self._rows, state["slots"], state["episode_starts"]
        x = z.new_empty((num_rows, inputs + heads * width + hidden))
        after, features = z.new_empty((num_rows, self._rows.shape[1])), z.new_empty((num_rows, self._sizes.features))
        sizes = {"HIDDEN": hidden, "CELLS": cells, "WIDTH": width, "HEADS": heads}

        launch(_collect, (num_rows,), z, *before, x, INPUTS=inputs, **sizes, BLOCK=triton.next_power_of_2(x.shape[1]))
        launch(
            _lstm, (num_rows,), self.gates(x), *before, after, features, **sizes,
            BLOCK=triton.next_power_of_2(hidden),
        )  # fmt: skip
        n, w = triton.next_power_of_2(cells), triton.next_power_of_2(width)
        launch(
            _access, (num_rows,), self.interface(features[:, :hidden]), *before, after, features, **sizes, N=n, W=w,
            num_warps=min(max(n * max(n, w) // _VALUES_PER_WARP, 1), 8),
        )  # fmt: skip
        return self.output(features), {"rows": after}


# Elementary functions.


@triton.jit
def _tanh(x):
    """Right to some units in the last place: near 0 by a series, where the quotient would cancel."""
    square = tl.minimum(x * x, 1.0)
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835))))
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _softplus(x):
    # torch's threshold: above it the function is x up to rounding.
    return tl.where(x > 20, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _content(memory, norms, key, strength, cells):
    """``C(M, k, β) = softmax_N(cos(M, k) β)``: memory ``[N, W]``, its cells' norms ``[N]``, key ``[W]`` -> ``[N]``."""
    norm = tl.sqrt(tl.sum(key * key, axis=0))
    cosine = tl.sum(memory * key[None, :], axis=1) / (norm * norms + _DELTA)
    score = tl.where(cells, cosine * strength, float("-inf"))
    e = tl.exp(score - tl.max(score, axis=0))
    return e / tl.sum(e, axis=0)


# The kernels: one program per row.


@triton.jit
def _collect(
    z, states, slots, episode_starts, x, INPUTS: tl.constexpr, HIDDEN: tl.constexpr, CELLS: tl.constexpr,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill the controller's input ``x [B, F + R W + H]`` with ``z [B, F]``, the last read vectors and h."""
    READ: tl.constexpr = HEADS * WIDTH
    STATE: tl.constexpr = 2 * HIDDEN + READ + CELLS * (WIDTH + CELLS + HEADS + 3)
    TOTAL: tl.constexpr = INPUTS + READ + HIDDEN
    row = tl.program_id(0)
    old = states + tl.load(slots + row) * STATE
    begun = tl.load(episode_starts + row) == 0
    k = tl.arange(0, BLOCK)
    is_input, is_read = k < INPUTS, k < INPUTS + READ
    inputs = tl.load(z + row * INPUTS + k, mask=is_input, other=0)
    read = tl.load(old + 2 * HIDDEN + k - INPUTS, mask=is_read & (k >= INPUTS) & begun, other=0)
    h = tl.load(old + k - INPUTS - READ, mask=(k >= INPUTS + READ) & (k < TOTAL) & begun, other=0)
    tl.store(x + row * TOTAL + k, tl.where(is_input, inputs, tl.where(is_read, read, h)), mask=k < TOTAL)


@triton.jit
def _lstm(
    gates, states, slots, episode_starts, after, features, HIDDEN: tl.constexpr, CELLS: tl.constexpr,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From ``gates [B, 4 H]`` (i, f, g, o) fill h and c of ``after [B, S]`` and h of ``features [B, H + R W]``."""
    READ: tl.constexpr = HEADS * WIDTH
    STATE: tl.constexpr = 2 * HIDDEN + READ + CELLS * (WIDTH + CELLS + HEADS + 3)
    row = tl.program_id(0)
    begun = tl.load(episode_starts + row) == 0
    k = tl.arange(0, BLOCK)
    inside = k < HIDDEN
    c = tl.load(states + tl.load(slots + row) * STATE + HIDDEN + k, mask=inside & begun, other=0)
    gate = gates + row * 4 * HIDDEN + k
    i = tl.sigmoid(tl.load(gate, mask=inside))
    f = tl.sigmoid(tl.load(gate + HIDDEN, mask=inside))
    g = _tanh(tl.load(gate + 2 * HIDDEN, mask=inside))
    o = tl.sigmoid(tl.load(gate + 3 * HIDDEN, mask=inside))
    c = f * c + i * g
    h = o * _tanh(c)
    tl.store(after + row * STATE + k, h, mask=inside)
    tl.store(after + row * STATE + HIDDEN + k, c, mask=inside)
    tl.store(features + row * (HIDDEN + READ) + k, h, mask=inside)


@triton.jit
def _access(
    interface, states, slots, episode_starts, after, features, HIDDEN: tl.constexpr, CELLS: tl.constexpr,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Write, then read: from ``interface [B, I]``, not yet activated, fill read vectors and memory of ``after [B, S]``
    and the read vectors of ``features [B, H + R W]``.
    """
    READ: tl.constexpr = HEADS * WIDTH
    MEMORY: tl.constexpr = 2 * HIDDEN + READ
    LINK: tl.constexpr = MEMORY + CELLS * WIDTH
    PRECEDENCE: tl.constexpr = LINK + CELLS * CELLS
    READS: tl.constexpr = PRECEDENCE + CELLS
    WRITE: tl.constexpr = READS + HEADS * CELLS
    USAGE: tl.constexpr = WRITE + CELLS
    STATE: tl.constexpr = USAGE + CELLS

    row = tl.program_id(0)
    begun = tl.load(episode_starts + row) == 0
    old, new = states + tl.load(slots + row) * STATE, after + row * STATE
    n, w = tl.arange(0, N), tl.arange(0, W)
    cells, columns = n < CELLS, w < WIDTH
    at_memory, in_memory = n[:, None] * WIDTH + w[None, :], cells[:, None] & columns[None, :]
    at_link, in_link = n[:, None] * CELLS + n[None, :], cells[:, None] & cells[None, :]
    memory = tl.load(old + MEMORY + at_memory, mask=in_memory & begun, other=0)
    link = tl.load(old + LINK + at_link, mask=in_link & begun, other=0)
    precedence = tl.load(old + PRECEDENCE + n, mask=cells & begun, other=0)
    old_write = tl.load(old + WRITE + n, mask=cells & begun, other=0)
    usage = tl.load(old + USAGE + n, mask=cells & begun, other=0)

    # The interface, in order: read keys, read strengths, write key, write strength, erase and write vector, free gates,
    # allocation gate, write gate, read modes (backward, forward, content).
    read_strengths = interface + row * (READ + 3 * WIDTH + 5 * HEADS + 3) + READ
    write_key = read_strengths + HEADS
    erase_vector = write_key + WIDTH + 1
    free_gates = erase_vector + 2 * WIDTH
    gates = free_gates + HEADS
    key = _tanh(tl.load(write_key + w, mask=columns, other=0))
    strength = _softplus(tl.load(write_key + WIDTH))
    erase = tl.sigmoid(tl.load(erase_vector + w, mask=columns, other=0))
    vector = _tanh(tl.load(erase_vector + WIDTH + w, mask=columns, other=0))
    allocation_gate, write_gate = tl.sigmoid(tl.load(gates)), tl.sigmoid(tl.load(gates + 1))

    # u = (u + (1-u) ww) Π_r (1 - f_r R_r)
    usage += (1 - usage) * old_write
    retention = tl.full([N], 1.0, tl.float32)
    for r in tl.static_range(HEADS):
        read = tl.load(old + READS + r * CELLS + n, mask=cells & begun, other=0)
        retention *= 1 - tl.sigmoid(tl.load(free_gates + r)) * read
    usage *= retention

    # a_i = (1 - u'_i) Π u'_j over the cells j that come before i in the order of u' = δ + (1-δ) u, ties by index.
    floored = _DELTA + (1 - _DELTA) * usage
    tied = (floored[None, :] == floored[:, None]) & (n[None, :] < n[:, None])
    emptier = ((floored[None, :] < floored[:, None]) | tied) & cells[None, :]
    allocation = (1 - floored) * tl.reduce(tl.where(emptier, floored[None, :], 1.0), 1, _multiply)

    # ww = gw (ga a + (1-ga) cw)
    content = _content(memory, tl.sqrt(tl.sum(memory * memory, axis=1)), key, strength, cells)
    write = write_gate * (allocation_gate * allocation + (1 - allocation_gate) * content)
    write = tl.where(cells, write, 0.0)
    # M = M (1 - ww eᵀ) + ww vᵀ
    memory = memory * (1 - write[:, None] * erase[None, :]) + write[:, None] * vector[None, :]
    # L[i,j] = (1 - ww[i] - ww[j]) L[i,j] + ww[i] p[j], 0 where i = j
    link = (1 - write[:, None] - write[None, :]) * link + write[:, None] * precedence[None, :]
    link = tl.where(n[:, None] == n[None, :], 0.0, link)
    # p = (1 - Σ ww) p + ww
    precedence = (1 - tl.sum(write, axis=0)) * precedence + write

    tl.store(new + MEMORY + at_memory, memory, mask=in_memory)
    tl.store(new + LINK + at_link, link, mask=in_link)
    tl.store(new + PRECEDENCE + n, precedence, mask=cells)
    tl.store(new + WRITE + n, write, mask=cells)
    tl.store(new + USAGE + n, usage, mask=cells)

    norms = tl.sqrt(tl.sum(memory * memory, axis=1))
    for r in tl.static_range(HEADS):
        key = _tanh(tl.load(read_strengths - READ + r * WIDTH + w, mask=columns, other=0))
        content = _content(memory, norms, key, _softplus(tl.load(read_strengths + r)), cells)
        # (fwd)_i = L R_i and (bwd)_i = Lᵀ R_i
        read = tl.load(old + READS + r * CELLS + n, mask=cells & begun, other=0)
        backward, forward = tl.sum(link * read[:, None], axis=0), tl.sum(link * read[None, :], axis=1)
        modes = gates + 2 + 3 * r
        mode_b, mode_f, mode_c = tl.load(modes), tl.load(modes + 1), tl.load(modes + 2)
        largest = tl.maximum(mode_b, tl.maximum(mode_f, mode_c))
        mode_b, mode_f, mode_c = tl.exp(mode_b - largest), tl.exp(mode_f - largest), tl.exp(mode_c - largest)
        read = (mode_b * backward + mode_f * forward + mode_c * content) / (mode_b + mode_f + mode_c)
        tl.store(new + READS + r * CELLS + n, read, mask=cells)
        read_vector = tl.sum(memory * read[:, None], axis=0)
        tl.store(new + 2 * HIDDEN + r * WIDTH + w, read_vector, mask=columns)
        tl.store(features + row * (HIDDEN + READ) + HIDDEN + r * WIDTH + w, read_vector, mask=columns)
