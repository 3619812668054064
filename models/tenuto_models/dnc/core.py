"""The DNC core: an LSTM controller, a memory access, and the output layer that sees both.

Legend: B rows, T time steps, F input features, H controller size, R read heads, W cell size, N memory cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tenuto_models.dnc.access import MemoryAccess
from tenuto_models.dnc.scan import Scan
from tenuto_models.errors import ConfigError
from tenuto_models.linear import linear
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


_SCANNED = (
    ("c", True), ("memory", False), ("link_matrix", True), ("precedence", True), ("read_weights", False),
    ("write_weights", True), ("usage_vector", False),
)  # fmt: skip
"""State tensors as :class:`Scan` takes them, and whether their spec has a leading 1 that it does without."""


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
        self.output = nn.Linear(hidden + read, hidden)
        self.state_spec: StateSpec = (
            TensorSpec("h", (1, hidden)),
            TensorSpec("c", (1, hidden)),
            TensorSpec("read_vectors", (read,)),
            *self.access.state_spec,
        )
        self._reset_gates(hidden)

    def _reset_gates(self, hidden: int) -> None:
        """Draw the gates as torch draws an LSTM: U(±1/√H) for the matrix and each of its two biases, here summed."""
        bound = hidden**-0.5
        nn.init.uniform_(self.gates.weight, -bound, bound)
        with torch.no_grad():
            self.gates.bias.uniform_(-bound, bound).add_(torch.empty_like(self.gates.bias).uniform_(-bound, bound))

    def step(self, z: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance one step: ``z [B, F]`` -> ``(y [B, H], state)``."""
        gates = self.gates(torch.cat([z, state["read_vectors"], state["h"].squeeze(1)], dim=1))
        controller, state = self._advance(gates, state)
        return self.output(torch.cat([controller, state["read_vectors"]], dim=1)), state

    def unroll(self, z: Tensor, state: State, seq_lens: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance a padded sequence: ``z [B, T, F]`` -> ``(y [B, T, H], state after seq_lens)``.

        The same function as :meth:`step` in a loop, up to rounding, computed by :class:`Scan`. No gradient flows
        through the returned state.
        """
        read = self.output.in_features - self.output_size
        interface, order = self.access.interface, self.access.order_by_activation
        carried = torch.cat([state["read_vectors"], state["h"].squeeze(1)], dim=1)
        features, carried, *scanned = Scan.apply(
            torch.is_grad_enabled(),
            linear(z.transpose(0, 1), self.gates.weight[:, : self.input_size], self.gates.bias),
            self.gates.weight[:, self.input_size :],
            interface.weight[order],
            interface.bias[order],
            carried,
            *(state[name].squeeze(1) if leading else state[name] for name, leading in _SCANNED),
        )
        # The features are [read_vectors, h], the columns of the output layer [h, read_vectors].
        y = linear(features, self.output.weight.roll(read, dims=1), self.output.bias).transpose(0, 1)
        if seq_lens is None:
            # Copies, so that the state does not keep all states before it alive.
            carried, *scanned = (states[-1].clone() for states in (carried, *scanned))
        else:
            last, rows = seq_lens.long(), torch.arange(len(seq_lens), device=seq_lens.device)
            carried, *scanned = (states[last, rows] for states in (carried, *scanned))
        after = {name: s.unsqueeze(1) if leading else s for (name, leading), s in zip(_SCANNED, scanned, strict=True)}
        return y, {"h": carried[:, read:].unsqueeze(1), "read_vectors": carried[:, :read], **after}

    def _advance(self, gates: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """LSTM pointwise part, then one memory access: gates ``[B, 4 H]`` -> ``(controller output [B, H], state)``."""
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * state["c"].squeeze(1) + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        read_vectors, memory_state = self.access(h, state)
        return h, {
            "h": h.unsqueeze(1),
            "c": c.unsqueeze(1),
            "read_vectors": read_vectors,
            **memory_state,
        }
