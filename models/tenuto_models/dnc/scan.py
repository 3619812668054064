"""The DNC over a whole sequence, with its gradient written out: for training, where autograd's bookkeeping of some
hundred small operations per step costs more than the operations.

Computes what ``DNCCore.step`` computes in a loop; :mod:`tenuto_models.dnc.addressing` has the equations in their plain
form. The reverse scan solves their adjoint equations; factors that do not wait for a later step are computed for
all steps at once, before it.

Legend: T time steps, B rows, H controller size, R read heads, W cell size, N memory cells. Everything is time-major.
A name ``d_x`` is the gradient of the loss with respect to ``x``; ``later_d_x`` is the part of it that later steps add.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tenuto_models.dnc.addressing import DELTA
from tenuto_models.linear import multiplier, product

_aten: Any = torch.ops.aten
_softmax_backward: Any = _aten._softmax_backward_data


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


def _forward(tape: Tape, from_input: Tensor, recurrent: Tensor, interface: Tensor, interface_bias: Tensor) -> None:
    """Fill the tape from its states at index 0.

    from_input ``[T, B, 4 H]``, recurrent ``[4 H, R W + H]``, interface ``[I, H]`` and its bias ``[I]`` regrouped.
    """
    steps, hidden, width, heads = tape.sizes.num_steps, tape.sizes.hidden, tape.sizes.width, tape.sizes.heads
    read = heads * width
    to_gates, to_interface = multiplier(recurrent.t()), multiplier(interface.t())
    one, delta = from_input.new_ones(1), from_input.new_full((1,), DELTA)

    inputs, gates, c, tanh_c = (x.unbind(0) for x in (from_input, tape.gates, tape.c, tape.tanh_c))
    i_f, i, f, g, o = (
        tape.gates[..., a * hidden : b * hidden].unbind(0) for a, b in ((0, 2), (0, 1), (1, 2), (2, 3), (3, 4))
    )
    carried = tape.carried.unbind(0)
    h = tape.carried[..., read:].unbind(0)
    read_vectors = tape.carried[..., :read].unflatten(2, (heads, width)).unbind(0)
    emitted = tape.interface.unbind(0)
    part = tape.cut(tape.interface)
    tanh_part, sigmoid_part, strengths = (part[n].unbind(0) for n in ("tanh", "sigmoid", "strengths"))
    keys = part["keys"].unbind(0)
    read_keys, write_key = part["keys"][:, :, :heads].unbind(0), part["keys"][:, :, heads:].unbind(0)
    read_strength = part["strengths"][:, :, :heads].unsqueeze(3).unbind(0)
    write_strength = part["strengths"][:, :, heads:].unsqueeze(3).unbind(0)
    vector_row, erase_row = part["write_vector"].unsqueeze(2).unbind(0), part["erase"].unsqueeze(2).unbind(0)
    free = part["free"].unsqueeze(3).unbind(0)
    allocation_gate, write_gate = part["allocation_gate"].unbind(0), part["write_gate"].unbind(0)
    emitted_modes, modes, mode_weights = (x.unbind(0) for x in (part["modes"], tape.modes, tape.modes.unsqueeze(4)))
    key_norms = tape.key_norms.unbind(0)
    read_key_norm = tape.key_norms[:, :, :heads].unsqueeze(3).unbind(0)
    write_key_norm = tape.key_norms[:, :, heads:].unsqueeze(3).unbind(0)
    kept, retention, grown, usage = (x.unbind(0) for x in (tape.kept, tape.retention, tape.grown, tape.usage))
    ascending, order, allocation = (x.unbind(0) for x in (tape.ascending, tape.order, tape.allocation))
    tape.before[:, :, 0] = 1
    before, before_but_first = tape.before.unbind(0), tape.before[:, :, 1:].unbind(0)
    memory, memory_t = tape.memory.unbind(0), tape.memory.mT.unbind(0)
    cell_norms, cell_norms_row = tape.cell_norms.unbind(0), tape.cell_norms.unsqueeze(2).unbind(0)
    write_denominator, write_cosine = tape.write_denominator.unbind(0), tape.write_cosine.unbind(0)
    write_content, write_content_flat = tape.write_content.unbind(0), tape.write_content.squeeze(2).unbind(0)
    mix, write = tape.mix.unbind(0), tape.write.unbind(0)
    write_row, write_column = tape.write.unsqueeze(2).unbind(0), tape.write.unsqueeze(3).unbind(0)
    change, shrink, unwritten = tape.change.unbind(0), tape.shrink.unbind(0), tape.unwritten.unbind(0)
    link, link_t = tape.link.unbind(0), tape.link.mT.unbind(0)
    diagonal = tape.link.diagonal(dim1=2, dim2=3).unbind(0)
    precedence, precedence_row = tape.precedence.unbind(0), tape.precedence.unsqueeze(2).unbind(0)
    read_denominator, read_cosine = tape.read_denominator.unbind(0), tape.read_cosine.unbind(0)
    reads, directions = tape.reads.unbind(0), tape.directions.unbind(0)
    backward, forward, read_content = (tape.directions[:, k].unbind(0) for k in range(3))

    for t in range(steps):
        n = t + 1
        torch.add(inputs[t], to_gates(carried[t]), out=gates[t])
        i_f[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        torch.mul(f[t], c[t], out=c[n]).addcmul_(i[t], g[t])
        torch.mul(o[t], torch.tanh(c[n], out=tanh_c[t]), out=h[n])

        torch.add(interface_bias, to_interface(h[n]), out=emitted[t])
        tanh_part[t].tanh_()
        sigmoid_part[t].sigmoid_()
        _aten.softplus.out(strengths[t], 1, 20, out=strengths[t])
        _aten._softmax.out(emitted_modes[t], 0, False, out=modes[t])
        torch.linalg.vector_norm(keys[t], dim=2, out=key_norms[t])

        # u = (u + (1-u) ww) ψ, ψ = Π_r (1 - f_r R_r)
        torch.addcmul(one, free[t], reads[t], value=-1, out=kept[t])
        torch.prod(kept[t], dim=1, out=retention[t])
        torch.addcmul(usage[t], 1 - usage[t], write[t], out=grown[t])
        torch.mul(grown[t], retention[t], out=usage[n])
        # a[φ_j] = (1 - u'[φ_j]) Π_{i<j} u'[φ_i]
        floored = (usage[n] * (1 - DELTA)).add_(DELTA)
        torch.sort(floored, stable=True, dim=1, out=(ascending[t], order[t]))
        torch.cumprod(ascending[t][:, :-1], dim=1, out=before_but_first[t])
        in_order = torch.addcmul(before[t], ascending[t], before[t], value=-1)
        allocation[t].scatter_(1, order[t], in_order)

        torch.addcmul(delta, write_key_norm[t], cell_norms_row[t], out=write_denominator[t])
        torch.div(torch.bmm(write_key[t], memory_t[t]), write_denominator[t], out=write_cosine[t])
        _aten._softmax.out(write_cosine[t] * write_strength[t], 2, False, out=write_content[t])
        torch.lerp(write_content_flat[t], allocation[t], allocation_gate[t], out=mix[t])
        torch.mul(mix[t], write_gate[t], out=write[n])

        # M = M + ww (v - e M)ᵀ
        torch.addcmul(vector_row[t], erase_row[t], memory[t], value=-1, out=change[t])
        torch.addcmul(memory[t], write_column[n], change[t], out=memory[n])
        torch.linalg.vector_norm(memory[n], dim=2, out=cell_norms[n])
        # L[i,j] = (1 - ww[i] - ww[j]) L[i,j] + ww[i] p[j]
        torch.sub(1 - write_column[n], write_row[n], out=shrink[t])
        torch.mul(shrink[t], link[t], out=link[n]).addcmul_(write_column[n], precedence_row[t])
        diagonal[n].zero_()
        torch.sub(one, write[n].sum(dim=1, keepdim=True), out=unwritten[t])
        torch.addcmul(write[n], unwritten[t], precedence[t], out=precedence[n])

        torch.bmm(reads[t], link[n], out=backward[t])
        torch.bmm(reads[t], link_t[n], out=forward[t])
        torch.addcmul(delta, read_key_norm[t], cell_norms_row[n], out=read_denominator[t])
        torch.div(torch.bmm(read_keys[t], memory_t[n]), read_denominator[t], out=read_cosine[t])
        _aten._softmax.out(read_cosine[t] * read_strength[t], 2, False, out=read_content[t])
        torch.sum(mode_weights[t] * directions[t], dim=0, out=reads[n])
        torch.bmm(reads[n], memory[n], out=read_vectors[n])


def _unit(x: Tensor, norms: Tensor) -> Tensor:
    """Return ``x / |x|``, and 0 where x is 0: the derivative of the norm."""
    return x / torch.where(norms > 0, norms, torch.inf).unsqueeze(-1)


def _reverse(
    tape: Tape, d_features: Tensor, recurrent: Tensor, interface: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Solve the adjoint equations from the last step to the first. Does not modify the tape.

    d_features ``[T, B, R W + H]`` -> gradients of the gates ``[T, B, 4 H]`` and of the interface ``[T, B, I]`` before
    their activations, and of the nine states at index 0.
    """
    steps, rows, hidden, cells, width, heads = tape.sizes
    read = heads * width
    part = tape.cut(tape.interface)

    # Factors of all steps at once. LSTM: what d_c (for i, f, g) and d_h (for o, c) are multiplied with.
    i, f, g, o = tape.gates.chunk(4, dim=2)
    by_c = torch.stack([g * i * (1 - i), tape.c[:-1] * f * (1 - f), i * (1 - g * g)], dim=2).unbind(0)
    o_by_h = (tape.tanh_c * o * (1 - o)).unbind(0)
    c_by_h = (o * (1 - tape.tanh_c.square())).unbind(0)
    forget = f.unbind(0)
    # Derivatives of the interface's activations.
    slope = torch.cat([
        1 - part["tanh"].square(), part["sigmoid"] * (1 - part["sigmoid"]), -torch.expm1(-part["strengths"]),
    ], dim=2).unbind(0)  # fmt: skip
    # Cosines: cos = dot / (|k| |M| + δ), weighted by β.
    keys, cell_directions = part["keys"], _unit(tape.memory, tape.cell_norms).unbind(0)
    key_directions = _unit(keys, tape.key_norms)
    read_directions, write_direction = key_directions[:, :, :heads].unbind(0), key_directions[:, :, heads:].unbind(0)
    read_factor = (part["strengths"][:, :, :heads].unsqueeze(3) / tape.read_denominator).unbind(0)
    write_factor = (part["strengths"][:, :, heads:].unsqueeze(3) / tape.write_denominator).unbind(0)
    # Writing: ww = gw (ga a + (1-ga) cw).
    ga, gw = part["allocation_gate"], part["write_gate"]
    allocation_by_write = (ga * gw * (1 - DELTA)).unbind(0)
    content_by_write = ((1 - ga) * gw).unsqueeze(3).unbind(0)
    gates_by_write = torch.stack([gw * (tape.allocation - tape.write_content.squeeze(2)), tape.mix], dim=2).unbind(0)
    # Allocation, in ascending order: a_j = (1 - u_j) P_j with P_j = Π_{i<j} u_i.
    weights = (tape.before * (1 - tape.ascending)).unbind(0)
    before, inverse = tape.before.unbind(0), tape.ascending.reciprocal().unbind(0)
    later_cells = d_features.new_ones(cells, cells).tril(-1)
    # Usage: u = (u + (1-u) ww) Π_r kept_r, kept_r = 1 - f_r R_r.
    usage_by_usage = (tape.retention * (1 - tape.write[:-1])).unbind(0)
    usage_by_write = (tape.retention * (1 - tape.usage[:-1])).unbind(0)
    others = torch.stack([
        tape.kept[:, :, [k for k in range(heads) if k != head]].prod(dim=2) for head in range(heads)
    ], dim=2) * -tape.grown.unsqueeze(2)  # fmt: skip
    usage_by_free = (others * tape.reads[:-1]).unbind(0)
    usage_by_reads = (others * part["free"].unsqueeze(3)).unbind(0)

    d_gates, d_interface = torch.empty_like(tape.gates), torch.empty_like(tape.interface)
    d_part = tape.cut(d_interface)
    d_i_f_g = d_gates[..., : 3 * hidden].unflatten(2, (3, hidden)).unbind(0)
    d_o, d_gates_steps = d_gates[..., 3 * hidden :].unbind(0), d_gates.unbind(0)
    d_emitted, d_pointwise = d_interface.unbind(0), d_part["pointwise"].unbind(0)
    d_read_keys, d_write_key = d_part["keys"][:, :, :heads].unbind(0), d_part["keys"][:, :, heads:].unbind(0)
    d_read_strength = d_part["strengths"][:, :, :heads].unbind(0)
    d_write_strength = d_part["strengths"][:, :, heads:].unbind(0)
    d_vector, d_erase = d_part["write_vector"].unbind(0), d_part["erase"].unbind(0)
    d_free = d_part["free"].unsqueeze(3).unbind(0)
    d_two_gates = d_interface[..., (heads + 3) * width + heads :][..., :2].unsqueeze(3).unbind(0)
    d_modes = d_part["modes"].unbind(0)

    outside = d_features.unbind(0)
    modes, mode_weights = tape.modes.unbind(0), tape.modes.unsqueeze(4).unbind(0)
    directions, read_content = tape.directions.unbind(0), tape.directions[:, 2].unbind(0)
    read_cosine, write_cosine = tape.read_cosine.unbind(0), tape.write_cosine.unbind(0)
    write_content, order = tape.write_content.unbind(0), tape.order.unbind(0)
    read_keys, write_key = keys[:, :, :heads].unbind(0), keys[:, :, heads:].unbind(0)
    minus_read_norms = -tape.key_norms[:, :, :heads].unsqueeze(2)
    minus_write_norm = -tape.key_norms[:, :, heads:].unsqueeze(2)
    minus_read_norms, minus_write_norm = minus_read_norms.unbind(0), minus_write_norm.unbind(0)
    memory, memory_t = tape.memory.unbind(0), tape.memory.mT.unbind(0)
    cell_norms = tape.cell_norms.unsqueeze(3).unbind(0)
    reads, reads_t = tape.reads.unbind(0), tape.reads.mT.unbind(0)
    link, link_t = tape.link.unbind(0), tape.link.mT.unbind(0)
    precedence, precedence_column = tape.precedence.unbind(0), tape.precedence.unsqueeze(3).unbind(0)
    write_row, write_column = tape.write.unsqueeze(2).unbind(0), tape.write.unsqueeze(3).unbind(0)
    shrink, unwritten, change = tape.shrink.unbind(0), tape.unwritten.unbind(0), tape.change.unbind(0)
    erase_row = part["erase"].unsqueeze(2).unbind(0)

    from_gates, from_interface = multiplier(recurrent), multiplier(interface)
    zero = tape.carried.new_zeros
    d_carried, d_c = zero(rows, read + hidden), zero(rows, hidden)
    d_memory, d_norms = zero(rows, cells, width), zero(rows, 1, cells)
    d_link, d_precedence = zero(rows, cells, cells), zero(rows, cells)
    d_reads, d_write, d_usage = zero(rows, heads, cells), zero(rows, cells), zero(rows, cells)
    for t in reversed(range(steps)):
        n = t + 1
        total = outside[t] + d_carried
        d_vectors, d_h = total[:, :read].unflatten(1, (heads, width)), total[:, read:]

        # Reading: rv = R M, R = Σ modes · (backward, forward, content).
        d_reads = torch.baddbmm(d_reads, d_vectors, memory_t[n])
        d_memory.baddbmm_(reads_t[n], d_vectors)
        d_mode_weights = torch.sum(directions[t] * d_reads, dim=3)
        d_modes[t].copy_(_softmax_backward(d_mode_weights, modes[t], 0, d_reads.dtype))
        d_backward, d_forward, d_content = (mode_weights[t] * d_reads).unbind(0)
        d_score = _softmax_backward(d_content, read_content[t], 2, d_content.dtype)
        weighted = d_score * read_cosine[t]
        torch.sum(weighted, dim=2, out=d_read_strength[t])
        d_dot, d_denominator = d_score.mul_(read_factor[t]), weighted.mul_(read_factor[t])
        d_key_norm = torch.bmm(d_denominator, cell_norms[n])
        torch.addcmul(torch.bmm(d_dot, memory[n]), d_key_norm, read_directions[t], value=-1, out=d_read_keys[t])
        d_memory.baddbmm_(d_dot.mT, read_keys[t])
        d_norms.baddbmm_(minus_read_norms[t], d_denominator)
        d_memory.addcmul_(d_norms.mT, cell_directions[n])

        # Link and precedence.
        d_link.baddbmm_(d_forward.mT, reads[t]).baddbmm_(reads_t[t], d_backward)
        d_link.diagonal(dim1=1, dim2=2).zero_()
        d_reads = torch.baddbmm(torch.bmm(d_forward, link[n]), d_backward, link_t[n])
        scaled = d_link * link[t]
        d_write += torch.bmm(d_link, precedence_column[t]).squeeze(2).sub_(scaled.sum(dim=2)).sub_(scaled.sum(dim=1))
        d_write += d_precedence
        d_write -= torch.sum(d_precedence * precedence[t], dim=1, keepdim=True)
        d_precedence = torch.addcmul(torch.bmm(write_row[n], d_link).squeeze(1), unwritten[t], d_precedence)
        d_link.mul_(shrink[t])

        # Memory: M = M + ww (v - e M)ᵀ.
        d_write += torch.sum(d_memory * change[t], dim=2)
        d_change = d_memory * write_column[n]
        torch.sum(d_change, dim=1, out=d_vector[t])
        torch.sum(d_change * memory[t], dim=1, out=d_erase[t]).neg_()
        d_memory.addcmul_(erase_row[t], d_change, value=-1)

        # Write weights: two gates, content, allocation.
        torch.bmm(gates_by_write[t], d_write.unsqueeze(2), out=d_two_gates[t])
        d_content = d_write.unsqueeze(1) * content_by_write[t]
        d_score = _softmax_backward(d_content, write_content[t], 2, d_content.dtype)
        weighted = d_score * write_cosine[t]
        torch.sum(weighted, dim=2, out=d_write_strength[t])
        d_dot, d_denominator = d_score.mul_(write_factor[t]), weighted.mul_(write_factor[t])
        d_key_norm = torch.bmm(d_denominator, cell_norms[t])
        torch.addcmul(torch.bmm(d_dot, memory[t]), d_key_norm, write_direction[t], value=-1, out=d_write_key[t])
        d_memory.addcmul_(d_dot.mT, write_key[t])
        d_norms = d_denominator.mul_(minus_write_norm[t])

        d_allocation = d_write.mul_(allocation_by_write[t]).gather(1, order[t])
        d_ascending = torch.mm(d_allocation * weights[t], later_cells).mul_(inverse[t])
        d_ascending.addcmul_(d_allocation, before[t], value=-1)
        d_usage.scatter_add_(1, order[t], d_ascending)
        torch.bmm(usage_by_free[t], d_usage.unsqueeze(2), out=d_free[t])
        d_reads.addcmul_(usage_by_reads[t], d_usage.unsqueeze(1))
        d_write = d_usage * usage_by_write[t]
        d_usage = d_usage * usage_by_usage[t]

        # The controller.
        d_pointwise[t].mul_(slope[t])
        d_h = d_h + from_interface(d_emitted[t])
        torch.mul(d_h, o_by_h[t], out=d_o[t])
        d_c.addcmul_(d_h, c_by_h[t])
        torch.mul(by_c[t], d_c.unsqueeze(1), out=d_i_f_g[t])
        d_c.mul_(forget[t])
        d_carried = from_gates(d_gates_steps[t])
    d_memory.addcmul_(d_norms.mT, cell_directions[0])
    states = [d_carried, d_c, d_memory, d_link, d_precedence, d_reads, d_write, d_usage]
    return d_gates, d_interface, states


class Scan(torch.autograd.Function):
    """``(from_input, recurrent, interface, bias, states before) -> (features [T, B, R W + H], states)``.

    Features are ``[read_vectors, h]`` after each step. The states are those of the tape, T + 1 of each; no gradient
    flows back through them.
    """

    @staticmethod
    def forward(
        ctx: Any, from_input: Tensor, recurrent: Tensor, interface: Tensor, bias: Tensor, *before: Tensor
    ) -> Any:
        """Run the sequence; keeps the tape for :meth:`backward`."""
        (steps, rows, _), hidden = from_input.shape, interface.shape[1]
        heads, cells = before[5].shape[1:]
        tape = Tape(from_input, Sizes(steps, rows, hidden, cells, before[2].shape[2], heads))
        states = (
            tape.carried, tape.c, tape.memory, tape.link, tape.precedence, tape.reads, tape.write, tape.usage
        )  # fmt: skip
        for state, first in zip(states, before, strict=True):
            state[0] = first
        tape.cell_norms[0] = torch.linalg.vector_norm(tape.memory[0], dim=2)
        _forward(tape, from_input, recurrent, interface, bias)
        ctx.tape = tape
        ctx.save_for_backward(recurrent, interface)
        detached = tuple(s.detach() for s in states)
        ctx.mark_non_differentiable(*detached)
        return tape.carried[1:], *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of every argument of :meth:`forward`, in its order."""
        tape: Tape = ctx.tape
        d_features = grad_outputs[0]
        recurrent, interface = ctx.saved_tensors
        d_gates, d_interface, d_states = _reverse(tape, d_features, recurrent, interface)
        h = tape.carried[1:, :, -tape.sizes.hidden :]
        flat_gates, flat_interface = d_gates.flatten(0, 1), d_interface.flatten(0, 1)
        d_recurrent = product(flat_gates.t(), tape.carried[:-1].flatten(0, 1))
        d_weight = product(flat_interface.t(), h.flatten(0, 1))
        return d_gates, d_recurrent, d_weight, flat_interface.sum(dim=0), *d_states
