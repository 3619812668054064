"""The gradient of the DNC over a whole sequence, written out: the adjoint equations, from the last step to the first.

Factors that do not wait for a later step are computed for all steps at once, before the loop.

Legend: T time steps, B rows, H controller size, R read heads, W cell size, N memory cells. Everything is time-major.
A name ``d_x`` is the gradient of the loss with respect to ``x``; before a step it holds what the later steps add.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenuto_models.dnc.addressing import DELTA
from tenuto_models.dnc.tape import Tape
from tenuto_models.linear import multiplier

_softmax_backward: Any = torch.ops.aten._softmax_backward_data


def _unit(x: Tensor, norms: Tensor) -> Tensor:
    """Return ``x / |x|``, and 0 where x is 0: the derivative of the norm."""
    return x / torch.where(norms > 0, norms, torch.inf).unsqueeze(-1)


def _through_content(
    d_content: Tensor, content: Tensor, cosine: Tensor, factor: Tensor, d_strength: Tensor
) -> tuple[Tensor, Tensor]:
    """Back through ``softmax(β cos)``, ``cos = dot / denominator``: fill ``d_strength``, that of β, and return the
    gradients of the dot product and, with the sign turned, of the denominator. ``factor`` is ``β / denominator``.
    """
    d_score = _softmax_backward(d_content, content, 2, d_content.dtype)
    weighted = d_score * cosine
    torch.sum(weighted, dim=2, out=d_strength)
    return d_score.mul_(factor), weighted.mul_(factor)


def reverse_scan(
    tape: Tape, d_features: Tensor, recurrent: Tensor, interface: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Solve the adjoint equations from the last step to the first. Does not modify the tape.

    d_features ``[T, B, R W + H]`` -> gradients of the gates ``[T, B, 4 H]`` and of the interface ``[T, B, I]`` before
    their activations, and of the eight states at index 0.
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
        d_dot, d_denominator = _through_content(
            d_content, read_content[t], read_cosine[t], read_factor[t], d_read_strength[t]
        )
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
        d_dot, d_denominator = _through_content(
            d_content, write_content[t], write_cosine[t], write_factor[t], d_write_strength[t]
        )
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
