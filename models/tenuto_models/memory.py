"""What a memory model owes the rest of tenuto: a state known at construction, a step, and an unrolled sequence.

Legend of the shapes: B rows (sessions or sequences), T time steps, F input features, D output features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = Mapping[str, Tensor]
"""Recurrent state of a batch: name -> ``[B, *shape]``, in the order of the core's ``state_spec``."""


@dataclass(frozen=True)
class TensorSpec:
    """One named state tensor of one session, without the batch dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def num_elements(self) -> int:
        """Number of scalars that one session holds in this tensor."""
        return prod(self.shape)


StateSpec: TypeAlias = tuple[TensorSpec, ...]


class MemoryCore(Protocol):
    """A recurrent core: pure functions of (input, state); neither call modifies its arguments."""

    input_size: int
    output_size: int
    state_spec: StateSpec

    def step(self, z: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance one step: ``z [B, F]`` and the state before it -> ``(y [B, D], state after it)``."""
        ...

    def unroll(self, z: Tensor, state: State, seq_lens: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Advance a padded sequence: ``z [B, T, F]``, ``seq_lens [B]`` -> ``(y [B, T, D], state)``.

        The state returned for row b is the one after its step ``seq_lens[b]``; what stands in the padding
        never reaches it. Without ``seq_lens`` every row is T long.
        """
        ...


def initial_state(spec: StateSpec, batch: int, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return the all-zero state of ``batch`` fresh episodes."""
    return {t.name: torch.zeros((batch, *t.shape), dtype=t.dtype, device=device) for t in spec}


def state_fingerprint(spec: StateSpec) -> str:
    """Return the sha256 (hex) of a state spec: equal exactly when names, shapes, dtypes and order are equal."""
    canonical = json.dumps([[t.name, list(t.shape), str(t.dtype).removeprefix("torch.")] for t in spec])
    return hashlib.sha256(canonical.encode()).hexdigest()
