"""The DNC on a CPU, over one step or a whole sequence, with its gradient written out: for training, where autograd's
bookkeeping of some hundred small operations per step costs more than the operations.

Computes what ``DNCCore.step`` computes in plain torch; matrix products are oneDNN's or torch's, the rest are
:mod:`tenuto_models.dnc.kernels`.

Legend: T time steps, B rows, H controller size, R read heads, W cell size, N memory cells, I interface size, S state
size. Everything is time-major.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tenuto_models.dnc import kernels
from tenuto_models.dnc.kernels import Sizes
from tenuto_models.linear import linear, multiplier, product


def compiled(z: Tensor) -> bool:
    """Return whether the kernels can take tensors such as ``z``."""
    return z.device.type == "cpu" and z.dtype in (torch.float32, torch.float64)


def advance(
    sizes: Sizes, gates: Tensor, to_interface: Tensor, bias: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step without gradients: gates ``[B, 4 H]`` before their activations, which it overwrites, and state
    ``[B, S]`` -> (features ``[B, H + R W]``, state).
    """
    read = sizes.heads * sizes.width
    after, features = torch.empty_like(state), state.new_empty((len(state), read + sizes.hidden))
    trace = np.empty((len(state), sizes.trace), dtype=features.numpy().dtype)
    gates_, before_, after_, features_, bias_ = _arrays(gates, state, after, features, bias)
    kernels.lstm(gates_, before_, after_, features_, sizes)
    emitted = torch.mm(features[:, : sizes.hidden], to_interface.t())
    kernels.access(emitted.numpy(), bias_, before_, after_, features_, trace, sizes)
    return features, after


class Scan(torch.autograd.Function):
    """``(sizes, keep, z [T, B, F], gates [4 H, F + R W + H] and their bias [4 H], interface [I, H] and its bias [I],
    state [B, S]) -> (features [T, B, H + R W], states [T + 1, B, S])``.

    Features are ``[h, read_vectors]`` after each step, states those before the first step and after each; no gradient
    flows back through them. ``keep`` what the backward pass needs.
    """

    @staticmethod
    def forward(
        ctx: Any, sizes: Sizes, keep: bool, z: Tensor, to_gates: Tensor, gates_bias: Tensor, to_interface: Tensor,
        interface_bias: Tensor, state: Tensor,
    ) -> Any:  # fmt: skip
        """Run the sequence."""
        steps, rows, inputs = z.shape
        from_input = linear(z, to_gates[:, :inputs], gates_bias)
        hidden, read = sizes.hidden, sizes.heads * sizes.width
        states = state.new_empty((steps + 1, rows, state.shape[1]))
        states[0] = state
        # Of the steps before the first there are read vectors and h, too.
        carried = state.new_empty((steps + 1, rows, read + hidden))
        torch.cat([state[:, :hidden], state[:, 2 * hidden : 2 * hidden + read]], dim=1, out=carried[0])
        kept = steps if keep else 1
        gates = state.new_empty((kept, rows, 4 * hidden))
        trace = state.new_empty((kept, rows, sizes.trace))

        into_gates, into_interface = multiplier(to_gates[:, inputs:].roll(hidden, dims=1).t()), multiplier(to_interface.t())
        states_, carried_, gates_, trace_, bias_ = _arrays(states, carried, gates, trace, interface_bias)
        for t in range(steps):
            at = t if keep else 0
            torch.add(from_input[t], into_gates(carried[t]), out=gates[at])
            kernels.lstm(gates_[at], states_[t], states_[t + 1], carried_[t + 1], sizes)
            emitted = into_interface(carried[t + 1, :, :hidden])
            kernels.access(
                emitted.numpy(), bias_, states_[t], states_[t + 1], carried_[t + 1], trace_[at], sizes
            )  # fmt: skip
        ctx.sizes, ctx.tape = sizes, (states, carried, gates, trace)
        ctx.save_for_backward(z, to_gates, to_interface)
        states = states.detach()
        ctx.mark_non_differentiable(states)
        return carried[1:], states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of every argument of :meth:`forward`, in its order."""
        sizes: Sizes = ctx.sizes
        states, carried, gates, trace = ctx.tape
        z, to_gates, to_interface = ctx.saved_tensors
        inputs = z.shape[2]
        steps, rows, _ = gates.shape
        hidden, read = sizes.hidden, sizes.heads * sizes.width
        d_features = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        d_gates = torch.empty_like(gates)
        d_interface = gates.new_empty((steps, rows, sizes.interface))
        d_state = torch.zeros_like(states[0])

        from_gates, from_interface = multiplier(to_gates[:, inputs:].roll(hidden, dims=1)), multiplier(to_interface)
        states_, gates_, trace_, d_features_, d_gates_, d_interface_, d_state_ = _arrays(
            states, gates, trace, d_features, d_gates, d_interface, d_state
        )
        for t in reversed(range(steps)):
            kernels.access_adjoint(
                trace_[t], states_[t], states_[t + 1], d_features_[t], d_state_, d_interface_[t], sizes
            )  # fmt: skip
            d_h = from_interface(d_interface[t])
            kernels.lstm_adjoint(
                gates_[t], states_[t], states_[t + 1], d_features_[t], d_h.numpy(), d_state_, d_gates_[t], sizes
            )
            d_carried = from_gates(d_gates[t])
            if t:
                d_features[t - 1] += d_carried
            else:
                d_state[:, :hidden], d_state[:, 2 * hidden : 2 * hidden + read] = d_carried.split([hidden, read], dim=1)

        flat_gates, flat_interface = d_gates.flatten(0, 1), d_interface.flatten(0, 1)
        d_z = product(flat_gates, to_gates[:, :inputs]).view(z.shape) if ctx.needs_input_grad[2] else None
        d_to_gates = product(flat_gates.t(), torch.cat([z, carried[:-1].roll(read, dims=2)], dim=2).flatten(0, 1))
        d_to_interface = product(flat_interface.t(), carried[1:, :, :hidden].flatten(0, 1))
        return (
            None, None, d_z, d_to_gates, flat_gates.sum(dim=0), d_to_interface, flat_interface.sum(dim=0), d_state
        )  # fmt: skip


def _arrays(*tensors: Tensor) -> list[Any]:
    """The tensors as numpy arrays over the same memory."""
    return [tensor.detach().numpy() for tensor in tensors]
