"""One access of the DNC's memory: write, then read, steered by the interface vector that the controller emits.

Legend: B rows, H controller size, N memory cells, W cell size, R read heads. Interface size: ``R W + 3 W + 5 R + 3``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenuto_models.dnc import addressing
from tenuto_models.memory import State, StateSpec, TensorSpec


class MemoryAccess(nn.Module):
    """Owns the interface layer. Stateless: the memory travels in and out of :meth:`forward`."""

    def __init__(self, hidden_size: int, num_cells: int, cell_size: int, num_read_heads: int) -> None:
        super().__init__()
        self.num_read_heads, self.cell_size = num_read_heads, cell_size
        r, w, n = num_read_heads, cell_size, num_cells
        # Cut of the interface vector, in order: read keys, read strengths, write key, write strength,
        # erase, write vector, free gates, allocation gate, write gate, read modes (backward, forward, content).
        self._cut = [r * w, r, w, 1, w, w, r, 1, 1, 3 * r]
        self.interface = nn.Linear(hidden_size, sum(self._cut))
        self.state_spec: StateSpec = (
            TensorSpec("memory", (n, w)),
            TensorSpec("link_matrix", (1, n, n)),
            TensorSpec("precedence", (1, n)),
            TensorSpec("read_weights", (r, n)),
            TensorSpec("write_weights", (1, n)),
            TensorSpec("usage_vector", (n,)),
        )

    def forward(self, controller: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Write and read once: controller output ``[B, H]`` -> ``(read_vectors [B, R W], memory state after)``."""
        r, w = self.num_read_heads, self.cell_size
        (read_keys, read_strengths, write_key, write_strength, erase, write_vector, free_gates, allocation_gate,
         write_gate, read_modes) = self.interface(controller).split(self._cut, dim=1)  # fmt: skip
        old_memory, old_reads = state["memory"], state["read_weights"]
        old_write, old_precedence = state["write_weights"].squeeze(1), state["precedence"].squeeze(1)

        usage = addressing.usage_after(state["usage_vector"], old_write, old_reads, torch.sigmoid(free_gates))
        allocation = addressing.allocation_weights(usage)
        content = addressing.content_weights(
            old_memory, torch.tanh(write_key).unsqueeze(1), F.softplus(write_strength)
        ).squeeze(1)
        mix = torch.sigmoid(allocation_gate)
        write = torch.sigmoid(write_gate) * (mix * allocation + (1 - mix) * content)

        # M = M (1 - ww eᵀ) + ww vᵀ
        column = write.unsqueeze(2)
        memory = old_memory * (1 - column * torch.sigmoid(erase).unsqueeze(1))
        memory = memory + column * torch.tanh(write_vector).unsqueeze(1)

        link = addressing.link_after(state["link_matrix"].squeeze(1), old_precedence, write)
        precedence = addressing.precedence_after(old_precedence, write)

        content = addressing.content_weights(memory, torch.tanh(read_keys).view(-1, r, w), F.softplus(read_strengths))
        # (fwd)_i = L R_i and (bwd)_i = Lᵀ R_i, heads as rows.
        forward, backward = old_reads @ link.transpose(1, 2), old_reads @ link
        modes = torch.softmax(read_modes.view(-1, r, 3), dim=2)
        reads = modes[:, :, 0:1] * backward + modes[:, :, 1:2] * forward + modes[:, :, 2:3] * content
        read_vectors = (reads @ memory).flatten(1)

        return read_vectors, {
            "memory": memory,
            "link_matrix": link.unsqueeze(1),
            "precedence": precedence.unsqueeze(1),
            "read_weights": reads,
            "write_weights": write.unsqueeze(1),
            "usage_vector": usage,
        }
