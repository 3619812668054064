"""The DNC core: an LSTM controller, a memory access, and the output layer that sees both.

Legend: B rows, T time steps, F input features, H controller size, R read heads, W cell size, N memory cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto_models.dnc.access import MemoryAccess
from tenuto_models.errors import ConfigError
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

        The part of the gates that does not wait for the memory, and the output layer, are one product per sequence.
        """
        from_input = F.linear(z, self.gates.weight[:, : self.input_size], self.gates.bias)
        recurrent = self.gates.weight[:, self.input_size :].t()
        states, features = [{t.name: state[t.name] for t in self.state_spec}], list[Tensor]()
        for t in range(z.shape[1]):
            before = states[-1]
            carried = torch.cat([before["read_vectors"], before["h"].squeeze(1)], dim=1)
            controller, after = self._advance(torch.addmm(from_input[:, t], carried, recurrent), before)
            states.append(after)
            features.append(torch.cat([controller, after["read_vectors"]], dim=1))
        y = self.output(torch.stack(features, dim=1))
        return y, states[-1] if seq_lens is None else _state_at(states, seq_lens)

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


def _state_at(states: list[dict[str, Tensor]], seq_lens: Tensor) -> dict[str, Tensor]:
    """Pick for row b the state after its step ``seq_lens[b]``; ``states`` holds T + 1 of them."""
    rows = torch.arange(seq_lens.shape[0], device=seq_lens.device)
    return {name: torch.stack([s[name] for s in states])[seq_lens.long(), rows] for name in states[0]}
