"""The DNC over a whole sequence on a CPU, with its gradient written out: for training, where autograd's
bookkeeping of some hundred small operations per step costs more than the operations.

Computes what ``DNCCore.step`` computes in plain torch; matrix products are oneDNN's or torch's, the rest are
:mod:`tenuto_models.dnc.kernels`.

Legend: T time steps, B rows, H controller size, R read heads, W cell size, N memory cells, I interface size, S state
size. Everything is time-major.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tenuto_models.dnc import kernels
from tenuto_models.dnc.kernels import Sizes
from tenuto_models.linear import linear, multiplier, product


def compiled(z: Tensor) -> bool:
    """Return whether the kernels can take tensors such as ``z``, and what the layers make of them."""
    return (
        z.device.type == "cpu"
        and z.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
    )  # fmt: skip


class Scan(torch.autograd.Function):
    """``(sizes, keep, active, z [T, B, F], gates [4 H, F + R W + H] and their bias [4 H], interface [I, H] and its bias
    [I], state [B, S]) -> (features [T, B, H + R W], states [T + 1, B, S])``.

    Longer rows stand before shorter ones: at step t the first ``active[t]`` of them advance. Features are
    ``[h, read_vectors]`` after each step, 0 in the padding; states are those before the first step and after each, and
    undefined in the padding; no gradient flows back through them. ``keep`` what the backward pass needs.
    """

    @staticmethod
    def forward(
        ctx: Any, sizes: Sizes, keep: bool, active: Sequence[int], z: Tensor, to_gates: Tensor, gates_bias: Tensor,
        to_interface: Tensor, interface_bias: Tensor, state: Tensor,
    ) -> Any:  # fmt: skip
        """Run the sequence."""
        steps, rows, inputs = z.shape
        from_input = linear(z, to_gates[:, :inputs], gates_bias)
        hidden, read = sizes.hidden, sizes.heads * sizes.width
        states = state.new_empty((steps + 1, rows, state.shape[1]))
        states[0] = state
        # features[t + 1] are those of step t; features[0] those before the first.
        features = state.new_zeros((steps + 1, rows, sizes.features))
        features[0, :, :hidden], features[0, :, hidden:] = state[:, :hidden], state[:, 2 * hidden : 2 * hidden + read]
        kept = steps if keep else 1
        gates = state.new_empty((kept, rows, 4 * hidden))
        trace = state.new_empty((kept, rows, sizes.trace))

        times_recurrent = multiplier(to_gates[:, inputs:].roll(hidden, dims=1).t())
        times_interface = multiplier(to_interface.t())
        states_, features_, gates_, trace_ = (x.numpy() for x in (states, features, gates, trace))
        for t, n in enumerate(active):
            at = t if keep else 0
            torch.add(from_input[t, :n], times_recurrent(features[t, :n]), out=gates[at, :n])
            before, after, out = states_[t, :n], states_[t + 1, :n], features_[t + 1, :n]
            kernels.lstm(gates_[at, :n], before, after, out, sizes)
            emitted = times_interface(features[t + 1, :n, :hidden]).add_(interface_bias).numpy()
            kernels.access(emitted, before, after, out, trace_[at, :n], sizes)
        ctx.sizes, ctx.active, ctx.tape = sizes, active, (states, features, gates, trace)
        ctx.save_for_backward(z, to_gates, to_interface)
        states = states.detach()
        ctx.mark_non_differentiable(states)
        return features[1:], states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of every argument of :meth:`forward`, in its order."""
        sizes: Sizes = ctx.sizes
        states, features, gates, trace = ctx.tape
        z, to_gates, to_interface = ctx.saved_tensors
        (steps, rows, inputs), hidden, read = z.shape, sizes.hidden, sizes.heads * sizes.width
        # To the gradients from outside, those that come back through the recurrence are added on the way.
        d_features = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        d_gates = torch.zeros_like(gates)
        d_interface = gates.new_zeros((steps, rows, sizes.interface))
        d_state = torch.zeros_like(states[0])

        times_recurrent = multiplier(to_gates[:, inputs:].roll(hidden, dims=1))
        times_interface = multiplier(to_interface)
        states_, gates_, trace_ = (x.numpy() for x in (states, gates, trace))
        d_features_, d_gates_, d_interface_, d_state_ = (x.numpy() for x in (d_features, d_gates, d_interface, d_state))
        for t, n in reversed(list(enumerate(ctx.active))):
            before, after, d_out, d_before = states_[t, :n], states_[t + 1, :n], d_features_[t, :n], d_state_[:n]
            kernels.access_adjoint(trace_[t, :n], before, after, d_out, d_before, d_interface_[t, :n], sizes)
            d_h = times_interface(d_interface[t, :n]).numpy()
            kernels.lstm_adjoint(gates_[t, :n], before, after, d_out, d_h, d_before, d_gates_[t, :n], sizes)
            d_carried = times_recurrent(d_gates[t, :n])
            if t:
                d_features[t - 1, :n] += d_carried
            else:
                d_state[:n, :hidden], d_state[:n, 2 * hidden : 2 * hidden + read] = d_carried.split([hidden, read], 1)

        flat_gates, flat_interface = d_gates.flatten(0, 1), d_interface.flatten(0, 1)
        d_z = product(flat_gates, to_gates[:, :inputs]).view(z.shape) if ctx.needs_input_grad[3] else None
        d_to_gates = product(flat_gates.t(), torch.cat([z, features[:-1].roll(read, dims=2)], dim=2).flatten(0, 1))
        d_to_interface = product(flat_interface.t(), features[1:, :, :hidden].flatten(0, 1))
        return (
            None, None, None, d_z, d_to_gates, flat_gates.sum(dim=0), d_to_interface, flat_interface.sum(dim=0), d_state
        )  # fmt: skip
