"""The DNC over a whole sequence, with its gradient written out: for training, where autograd's bookkeeping of some
hundred small operations per step costs more than the operations.

Computes what ``DNCCore.step`` computes in a loop; :mod:`tenuto_models.dnc.addressing` has the equations in their plain
form.

Legend: T time steps, B rows, H controller size, R read heads, W cell size, N memory cells. Everything is time-major.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tenuto_models.dnc.addressing import DELTA
from tenuto_models.dnc.reverse_scan import reverse_scan
from tenuto_models.dnc.tape import Sizes, Tape
from tenuto_models.linear import multiplier, product

_aten: Any = torch.ops.aten


class Scan(torch.autograd.Function):
    """``(keep, from_input, recurrent, interface, bias, states before) -> (features [T, B, R W + H], states)``.

    Features are ``[read_vectors, h]`` after each step. The states are those of the tape, T + 1 of each; no gradient
    flows back through them.
    """

    @staticmethod
    def forward(
        ctx: Any, keep: bool, from_input: Tensor, recurrent: Tensor, interface: Tensor, bias: Tensor, *before: Tensor
    ) -> Any:
        """Run the sequence; ``keep`` the tape for :meth:`backward`."""
        (steps, rows, _), hidden = from_input.shape, interface.shape[1]
        heads, cells = before[5].shape[1:]
        tape = Tape(from_input, Sizes(steps, rows, hidden, cells, before[2].shape[2], heads), keep=keep)
        states = (
            tape.carried, tape.c, tape.memory, tape.link, tape.precedence, tape.reads, tape.write, tape.usage
        )  # fmt: skip
        for state, first in zip(states, before, strict=True):
            state[0] = first
        tape.cell_norms[0] = torch.linalg.vector_norm(tape.memory[0], dim=2)
        _scan(tape, from_input, recurrent, interface, bias)
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
        d_gates, d_interface, d_states = reverse_scan(tape, d_features, recurrent, interface)
        h = tape.carried[1:, :, -tape.sizes.hidden :]
        flat_gates, flat_interface = d_gates.flatten(0, 1), d_interface.flatten(0, 1)
        d_recurrent = product(flat_gates.t(), tape.carried[:-1].flatten(0, 1))
        d_weight = product(flat_interface.t(), h.flatten(0, 1))
        return None, d_gates, d_recurrent, d_weight, flat_interface.sum(dim=0), *d_states


def _scan(tape: Tape, from_input: Tensor, recurrent: Tensor, interface: Tensor, interface_bias: Tensor) -> None:
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
