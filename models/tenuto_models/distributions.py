"""From logits to actions: one distribution per action space, driven by numbers that are handed in.

Legend: B rows, K logits, A action dimensions. Every random draw comes as ``uniforms [B, A]`` in (0, 1), made by
``sampling.uniforms`` from (seed, step index), so an action never depends on who else is in the batch.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from tenuto_models.errors import ConfigError


class ActionDistribution(Protocol):
    """Maps logits to actions of one space. Raw actions are what log-probabilities are taken of."""

    num_logits: int
    num_uniforms: int

    def to(self, device: torch.device) -> ActionDistribution:
        """Return a copy whose constants are on a device: nothing is copied there when it is used."""
        ...

    def sample(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Draw: logits ``[B, K]``, uniforms ``[B, A]`` -> raw action ``[B, A]``."""
        ...

    def greedy(self, logits: Tensor) -> Tensor:
        """Return the mode: logits ``[B, K]`` -> raw action ``[B, A]``."""
        ...

    def log_prob(self, logits: Tensor, raw: Tensor) -> Tensor:
        """Log-probability (density for Box) of raw actions: -> ``[B]``."""
        ...

    def to_space(self, raw: Tensor) -> Tensor:
        """Raw action ``[B, A]`` -> action of the space ``[B, *shape]`` in the space's units and dtype."""
        ...

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Factor and summand ``[A]``, float64, that turn a raw action into the space's units."""
        ...

    def in_space(self, scaled: NDArray[np.float64]) -> NDArray[Any]:
        """Finish what :meth:`to_space` does, from ``[B, A]`` in the space's units."""
        ...


class Categoricals:
    """Independent categoricals: Discrete (one), MultiDiscrete (one per entry), MultiBinary (two-way, one per bit)."""

    def __init__(self, sizes: list[int], starts: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.sizes, self.shape, self.dtype = sizes, shape, dtype
        self.num_logits, self.num_uniforms = sum(sizes), len(sizes)
        self._starts = torch.tensor(starts, dtype=torch.int64)
        self._numpy_dtype = np.dtype(str(dtype).removeprefix("torch."))

    def to(self, device: torch.device) -> Categoricals:
        """Return a copy whose constants are on a device."""
        moved = copy.copy(self)
        moved._starts = self._starts.to(device)
        return moved

    def sample(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Invert the cumulative distribution: the first class whose cumulated probability exceeds the uniform."""
        columns = []
        for part, u in zip(logits.split(self.sizes, dim=1), uniforms.split(1, dim=1), strict=True):
            cumulated = torch.softmax(part, dim=1).cumsum(dim=1)
            # The last class takes what rounding leaves, so it is not compared.
            columns.append((u >= cumulated[:, :-1]).sum(dim=1))
        return torch.stack(columns, dim=1)

    def greedy(self, logits: Tensor) -> Tensor:
        """Return the most probable class of each categorical, the lowest index at ties."""
        return torch.stack([part.argmax(dim=1) for part in logits.split(self.sizes, dim=1)], dim=1)

    def log_prob(self, logits: Tensor, raw: Tensor) -> Tensor:
        """Sum of the log-probabilities of the chosen classes: -> ``[B]``."""
        chosen = [
            torch.log_softmax(part, dim=1).gather(1, index)
            for part, index in zip(logits.split(self.sizes, dim=1), raw.split(1, dim=1), strict=True)
        ]
        return torch.cat(chosen, dim=1).sum(dim=1)

    def to_space(self, raw: Tensor) -> Tensor:
        """Add the start of each entry and take the space's shape and dtype."""
        return (raw + self._starts.to(raw.device)).to(self.dtype).view(-1, *self.shape)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Factor and summand ``[A]``, float64, that turn a raw action into the space's units."""
        return torch.ones(len(self.sizes), dtype=torch.float64), self._starts.double()

    def in_space(self, scaled: NDArray[np.float64]) -> NDArray[Any]:
        """Finish what :meth:`to_space` does, from ``[B, A]`` in the space's units."""
        return scaled.astype(self._numpy_dtype).reshape(-1, *self.shape)


class Gaussian:
    """Diagonal Gaussian for Box: logits are ``[mean, log_std]``, each A wide.

    Where a dimension is bounded on both sides the Gaussian lives in [-1, 1] and is scaled to the bounds (RLlib's
    ``normalize_actions``); elsewhere it is in the space's own units. Actions are clipped to the bounds.
    """

    def __init__(self, space: spaces.Box) -> None:
        self.shape = tuple(space.shape)
        self.num_uniforms = int(np.prod(space.shape))
        self.num_logits = 2 * self.num_uniforms
        low, high = (torch.tensor(b, dtype=torch.float64).flatten() for b in (space.low, space.high))
        bounded = torch.isfinite(low) & torch.isfinite(high)
        # Halved first: the width of a Box may be beyond the largest float.
        self._scale = torch.where(bounded, high / 2 - low / 2, torch.ones_like(low))
        self._shift = torch.where(bounded, high / 2 + low / 2, torch.zeros_like(low))
        self.dtype = torch.from_numpy(np.empty(0, dtype=space.dtype)).dtype
        self._low, self._high = low.to(self.dtype), high.to(self.dtype)

    def to(self, device: torch.device) -> Gaussian:
        """Return a copy whose constants are on a device."""
        moved = copy.copy(self)
        for name in ("_scale", "_shift", "_low", "_high"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def sample(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """``mean + exp(log_std) Φ⁻¹(u)``."""
        mean, log_std = logits.chunk(2, dim=1)
        return mean + log_std.exp() * torch.special.ndtri(uniforms)

    def greedy(self, logits: Tensor) -> Tensor:
        """Return the mean."""
        return logits.chunk(2, dim=1)[0]

    def log_prob(self, logits: Tensor, raw: Tensor) -> Tensor:
        """Log-density of the unclipped, unscaled draw, summed over the dimensions: -> ``[B]``."""
        mean, log_std = logits.chunk(2, dim=1)
        z = (raw - mean) / log_std.exp()
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=1)

    def to_space(self, raw: Tensor) -> Tensor:
        """Scale to the bounds, clip, and take the space's shape and dtype."""
        device = raw.device
        scaled = raw.double() * self._scale.to(device) + self._shift.to(device)
        # Clipped in the space's own dtype, in which its bounds are exact.
        clipped = scaled.to(self.dtype).clamp(self._low.to(device), self._high.to(device))
        return clipped.view(-1, *self.shape)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Factor and summand ``[A]``, float64, that turn a raw action into the space's units."""
        return self._scale, self._shift

    def in_space(self, scaled: NDArray[np.float64]) -> NDArray[Any]:
        """Finish what :meth:`to_space` does, from ``[B, A]`` in the space's units."""
        low, high = self._low.numpy(), self._high.numpy()
        with np.errstate(over="ignore"):
            return np.clip(scaled.astype(low.dtype), low, high).reshape(-1, *self.shape)


def distribution_for(space: spaces.Space[Any]) -> ActionDistribution:
    """Return the distribution for an action space. Raises ConfigError for any but the four supported kinds."""
    if isinstance(space, spaces.Discrete):
        return Categoricals([int(space.n)], [int(space.start)], (), torch.int64)
    if isinstance(space, spaces.MultiDiscrete):
        return Categoricals(space.nvec.ravel().tolist(), space.start.ravel().tolist(), tuple(space.shape), torch.int64)
    if isinstance(space, spaces.MultiBinary):
        bits = int(np.prod(space.shape))
        return Categoricals([2] * bits, [0] * bits, tuple(space.shape), torch.int8)
    if isinstance(space, spaces.Box) and np.issubdtype(np.dtype(space.dtype), np.floating):
        return Gaussian(space)
    raise ConfigError(f"action space: got {space}, expected Discrete, MultiDiscrete, MultiBinary or a float Box")
