"""The DNC core: an LSTM controller, a memory access, and the output layer that sees both.

Legend: B rows, T time steps, F input features, H controller size, R read heads, W cell size, N memory cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tenuto_models.dnc.access import MemoryAccess
from tenuto_models.dnc.kernels import Sizes
from tenuto_models.dnc.scan import Scan, advance, compiled
from tenuto_models.errors import ConfigError
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
        self._sizes = Sizes(hidden, config.num_cells, config.cell_size, config.num_read_heads)
        self._reset_gates(hidden)

    def _reset_gates(self, hidden: int) -> None:
        """Draw the gates as torch draws an LSTM: U(±1/√H) for the matrix and each of its two biases, here summed."""
        bound = hidden**-0.5
        nn.init.uniform_(self.gates.weight, -bound, bound)
        with torch.no_grad():
            self.gates.bias.uniform_(-bound, bound).add_(torch.empty_like(self.gates.bias).uniform_(-bound, bound))

    def step(self, z: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance one step: ``z [B, F]`` -> ``(y [B, H], state)``. On a CPU without gradients by compiled code."""
        gates = self.gates(torch.cat([z, state["read_vectors"], state["h"].squeeze(1)], dim=1))
        if compiled(z) and not torch.is_grad_enabled():
            interface = self.access.interface
            features, after = advance(self._sizes, gates, interface.weight, interface.bias, self._pack(state))
            return self.output(features), self._unpack(after)
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * state["c"].squeeze(1) + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        read_vectors, memory_state = self.access(h, state)
        y = self.output(torch.cat([h, read_vectors], dim=1))
        return y, {"h": h.unsqueeze(1), "c": c.unsqueeze(1), "read_vectors": read_vectors, **memory_state}

    def unroll(self, z: Tensor, state: State, seq_lens: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance a padded sequence: ``z [B, T, F]`` -> ``(y [B, T, H], state after seq_lens)``.

        The same function as :meth:`step` in a loop, up to rounding; on a CPU computed by :class:`Scan`. No gradient
        flows through the returned state.
        """
        steps = z.shape[1]
        last = z.new_full((len(z),), steps, dtype=torch.int64) if seq_lens is None else seq_lens.long()
        if not compiled(z):
            outputs, after = list[Tensor](), self._pack(state)
            for t in range(steps):
                y, state = self.step(z[:, t], state)
                outputs.append(y)
                after = torch.where((last > t).unsqueeze(1), self._pack(state), after)
            return torch.stack(outputs, dim=1), self._unpack(after.detach())
        features, states = Scan.apply(
            self._sizes, torch.is_grad_enabled(), z.transpose(0, 1), self.gates.weight, self.gates.bias,
            self.access.interface.weight, self.access.interface.bias, self._pack(state),
        )  # fmt: skip
        after = states[last, torch.arange(len(z))]
        return self.output(features).transpose(0, 1), self._unpack(after)

    def _pack(self, state: State) -> Tensor:
        """``[B, S]``: every tensor of the state side by side, in the order of the spec."""
        return torch.cat([state[spec.name].flatten(1) for spec in self.state_spec], dim=1)

    def _unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Name the tensors of a packed state, as views."""
        tensors = packed.split([spec.num_elements for spec in self.state_spec], dim=1)
        return {s.name: tensor.unflatten(1, s.shape) for s, tensor in zip(self.state_spec, tensors, strict=True)}
