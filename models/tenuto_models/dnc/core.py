"""The DNC core: an LSTM controller, a memory access, and the output layer that sees both.

Legend: B rows, T time steps, F input features, H controller size, R read heads, W cell size, N memory cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tenuto_models.dnc import kernels
from tenuto_models.dnc.access import MemoryAccess
from tenuto_models.dnc.kernels import Sizes
from tenuto_models.dnc.scan import Scan, compiled
from tenuto_models.errors import ConfigError, InputError
from tenuto_models.linear import Linear
from tenuto_models.memory import State, StateSpec, TensorSpec


@dataclass(frozen=True)
class DNCConfig:
    """Sizes of a DNC; the defaults are those of POPGym's ``DiffNC``."""

    hidden_size: int = 256
    """H: width of the LSTM controller and of the core's output."""
    num_cells: int = 16
    """N: rows of the memory."""
    cell_size: int = 16
    """W: floats in one cell."""
    num_read_heads: int = 4
    """R: read heads; there is one write head."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_cells", "cell_size", "num_read_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"DNCConfig.{name}: got {value!r}, expected an integer >= 1")

    def build(self, input_size: int) -> DNCCore:
        """Return a freshly initialised core for inputs of ``input_size`` features."""
        return DNCCore(input_size, self)


class DNCCore(nn.Module):
    """LSTM + external memory, every parameter built here. The reads of step t-1 reach the controller at step t,
    in a single step and in a sequence alike.

    The reference clamps the controller's output to ±20, which an LSTM's |h| < 1 never reaches; it is left out.
    """

    def __init__(self, input_size: int, config: DNCConfig) -> None:
        super().__init__()
        hidden, read = config.hidden_size, config.num_read_heads * config.cell_size
        self.input_size, self.output_size = input_size, hidden
        # One matrix for [z, read_vectors, h]; gate order i, f, g, o.
        self.gates = nn.Linear(input_size + read + hidden, 4 * hidden)
        self.access = MemoryAccess(hidden, config.num_cells, config.cell_size, config.num_read_heads)
        self.output = Linear(hidden + read, hidden)
        self.state_spec: StateSpec = (
            TensorSpec("h", (1, hidden)),
            TensorSpec("c", (1, hidden)),
            TensorSpec("read_vectors", (read,)),
            *self.access.state_spec,
        )
        self.sizes = Sizes(hidden, config.num_cells, config.cell_size, config.num_read_heads)
        self._reset_gates(hidden)

    def _reset_gates(self, hidden: int) -> None:
        """Draw the gates as torch draws an LSTM: U(±1/√H) for the matrix and each of its two biases, here summed."""
        bound = hidden**-0.5
        nn.init.uniform_(self.gates.weight, -bound, bound)
        with torch.no_grad():
            self.gates.bias.uniform_(-bound, bound).add_(torch.empty_like(self.gates.bias).uniform_(-bound, bound))

    def step(self, z: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance one step: ``z [B, F]`` -> ``(y [B, H], state)``. On a CPU without gradients by compiled code."""
        self._require_fit(z, state)
        gates = self.gates(torch.cat([z, state["read_vectors"], state["h"].squeeze(1)], dim=1))
        if compiled(z) and not torch.is_grad_enabled():
            return self._step_compiled(gates, self._pack(state))
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * state["c"].squeeze(1) + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        read_vectors, memory_state = self.access(h, state)
        y = self.output(torch.cat([h, read_vectors], dim=1))
        return y, {"h": h.unsqueeze(1), "c": c.unsqueeze(1), "read_vectors": read_vectors, **memory_state}

    def _step_compiled(self, gates: Tensor, before: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`step` from gates ``[B, 4 H]``, which it overwrites, and the packed state."""
        sizes, after = self.sizes, torch.empty_like(before)
        features = gates.new_empty((len(gates), sizes.features))
        states = before.numpy(), after.numpy(), features.numpy()
        kernels.lstm(gates.numpy(), *states, sizes)
        interface = self.access.interface(features[:, : sizes.hidden].contiguous())
        kernels.access(interface.numpy(), *states, interface.new_empty((len(gates), sizes.trace)).numpy(), sizes)
        return self.output(features), self._unpack(after)

    def unroll(self, z: Tensor, state: State, seq_lens: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance a padded sequence: ``z [B, T, F]`` -> ``(y [B, T, H], state after seq_lens)``.

        The same function as :meth:`step` in a loop, up to rounding; on a CPU computed by :class:`Scan`. No gradient
        flows through the returned state.
        """
        self._require_fit(z, state)
        (rows, steps, _), before = z.shape, self._pack(state)
        lengths = self._lengths(seq_lens, rows, steps, z.device)
        if not compiled(z):
            return self._unroll_by_steps(z, state, before, lengths)
        # The longest row first: what is advanced at a step then stands side by side.
        by_length = torch.argsort(lengths, descending=True, stable=True)
        active = (lengths > torch.arange(steps).unsqueeze(1)).sum(dim=1).tolist()
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (z, before, *self.parameters()))
        features, states = Scan.apply(
            self.sizes, keep, active, z.transpose(0, 1)[:, by_length], self.gates.weight, self.gates.bias,
            self.access.interface.weight, self.access.interface.bias, before[by_length],
        )  # fmt: skip
        as_given = torch.argsort(by_length)
        return self.output(features[:, as_given]).transpose(0, 1), self._unpack(states[lengths, as_given])

    def _unroll_by_steps(
        self, z: Tensor, state: State, before: Tensor, lengths: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`unroll` where the kernels cannot go: autograd differentiates the steps."""
        outputs, after, ends = list[Tensor](), before.detach(), set(lengths.tolist())
        for t in range(z.shape[1]):
            y, state = self.step(z[:, t], state)
            outputs.append(y)
            if t + 1 in ends:
                with torch.no_grad():
                    after = torch.where((lengths == t + 1).unsqueeze(1), self._pack(state), after)
        y = torch.stack(outputs, dim=1) if outputs else z.new_zeros(len(z), 0, self.output_size)
        return y, self._unpack(after)

    def _lengths(self, seq_lens: Tensor | None, rows: int, steps: int, device: torch.device) -> Tensor:
        """Lengths ``[B]`` as int64; T without ``seq_lens``. Raises InputError."""
        if seq_lens is None:
            return torch.full((rows,), steps, device=device)
        if seq_lens.shape != (rows,) or (rows and not 0 <= int(seq_lens.min()) <= int(seq_lens.max()) <= steps):
            raise InputError(f"seq_lens: got {seq_lens.tolist()}, expected {rows} numbers from 0 to {steps}")
        return seq_lens.long()

    def _require_fit(self, z: Tensor, state: State) -> None:
        """Raise InputError for a ``z [B, ..., F]`` or a state of other sizes, which kernels would not notice."""
        if z.shape[-1] != self.input_size:
            raise InputError(f"z: got {z.shape[-1]} features, expected {self.input_size}")
        for spec in self.state_spec:
            tensor, expected = state[spec.name], (len(z), *spec.shape)
            if tensor.shape != expected or (compiled(z) and tensor.dtype != z.dtype):
                got = f"{[*tensor.shape]} {tensor.dtype}"
                raise InputError(f"state {spec.name}: got {got}, expected {[*expected]} {z.dtype}")

    def _pack(self, state: State) -> Tensor:
        """``[B, S]``: every tensor of the state side by side, in the order of the spec."""
        return torch.cat([state[spec.name].flatten(1) for spec in self.state_spec], dim=1)

    def _unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Name the tensors of a packed state, as views."""
        tensors = packed.split([spec.num_elements for spec in self.state_spec], dim=1)
        return {s.name: tensor.unflatten(1, s.shape) for s, tensor in zip(self.state_spec, tensors, strict=True)}
