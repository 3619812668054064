"""Embeddings of the step counter, by POPGym's names: integer steps ``[B, T]`` -> float32 ``[B, T, E]``.

Every one is defined for every step: a table's last row stands for all steps beyond it, formulas go on.

Legend: B rows, T time steps, E embedded features, P period (see ``embedding_period``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tenuto_models.embedding import SineEmbedding


class Table(nn.Module):
    """One row per step, drawn from N(0, 1); learned, or fixed once drawn."""

    weight: Tensor

    def __init__(self, size: int, period: int, *, learned: bool) -> None:
        super().__init__()
        rows = torch.randn(period, size)
        if learned:
            self.weight = nn.Parameter(rows)
        else:
            self.register_buffer("weight", rows)

    def forward(self, t: Tensor) -> Tensor:
        """Look up the rows of steps."""
        return self.weight[t.clamp(max=self.weight.shape[0] - 1)]


class ScaledSine(nn.Module):
    """The sine embedding with a learned scale per feature, three quarters of which begin at 0."""

    def __init__(self, size: int, period: int) -> None:
        super().__init__()
        self.sine = SineEmbedding(size, period)
        scale = torch.rand(size)
        scale[torch.randperm(size)[: round(0.75 * size)]] = 0
        self.scale = nn.Parameter(scale)

    def forward(self, t: Tensor) -> Tensor:
        """``scale PE[t]``."""
        return self.scale * self.sine(t)


class SimpleScaled(nn.Module):
    """The last four features are the fraction t / P, the others 0."""

    direction: Tensor

    def __init__(self, size: int, period: int) -> None:
        super().__init__()
        direction = torch.zeros(size)
        direction[-4:] = 1 / period
        self.register_buffer("direction", direction)

    def forward(self, t: Tensor) -> Tensor:
        """``t v``."""
        return t.unsqueeze(-1) * self.direction


class Perceptron(nn.Module):
    """``sin(w t)`` with learned frequencies."""

    def __init__(self, size: int, period: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, size, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        """Embed steps; frequencies need no period."""
        return self.linear(t.unsqueeze(-1).float()).sin()


class Base2(nn.Module):
    """The binary digits of t, least first; features from the 17th on repeat the 17th digit."""

    digits: Tensor

    def __init__(self, size: int, period: int) -> None:
        super().__init__()
        self.register_buffer("digits", 2 ** torch.arange(size).clamp(max=16), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """0 or 1 for each digit."""
        return t.unsqueeze(-1).bitwise_and(self.digits).ne(0).float()


class Time2Vec(nn.Module):
    """One linear feature, then sines, of a learned frequency and phase each."""

    def __init__(self, size: int, period: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, size)

    def forward(self, t: Tensor) -> Tensor:
        """``[w_0 t + b_0, sin(w_i t + b_i) …]``."""
        phase = self.linear(t.unsqueeze(-1).float())
        return torch.cat([phase[..., :1], phase[..., 1:].sin()], dim=-1)


EMBEDDINGS: dict[str, Callable[[int, int], nn.Module]] = {
    "learned": lambda size, period: Table(size, period, learned=True),
    "fixed": lambda size, period: Table(size, period, learned=False),
    "sine": SineEmbedding,
    "scaled_sine": ScaledSine,
    "simple_scaled": SimpleScaled,
    "perceptron": Perceptron,
    "base2": Base2,
    "time2vec": Time2Vec,
}
"""Name in the configuration -> constructor from (E, P)."""
