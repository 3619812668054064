"""Sine positional embedding of the step counter, without a table and so without a limit of length."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SineEmbedding(nn.Module):
    """``PE[t, 2i] = sin(t ω_i)``, ``PE[t, 2i+1] = cos(t ω_i)``, ``ω_i = period^(-2i/F)``. No parameters.

    POPGym ties ``period`` to RLlib's ``max_seq_len`` and fails beyond it; here it is a constant of the model, and the
    phase is reduced to one turn in float64 first, so the result is as exact at step 10^6 as at step 1.
    """

    turns: Tensor

    def __init__(self, num_features: int, period: float) -> None:
        super().__init__()
        self.num_features, self.period = num_features, period
        exponent = torch.arange(0, num_features, 2, dtype=torch.float64) / num_features
        self.register_buffer("turns", period**-exponent / (2 * math.pi), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Embed step numbers: integer ``[...]`` -> float32 ``[..., F]``."""
        phase = torch.frac(t.unsqueeze(-1) * self.turns)
        angle = phase.to(torch.float32) * (2 * math.pi)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., : self.num_features]
