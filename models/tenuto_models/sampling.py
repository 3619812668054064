"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A draw is a pure function of (seed, step index, dimension). Nothing is stored, so a retried or replayed step draws the
same numbers, whichever batch it is in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenuto_models.jit import Kernel, jit

U64 = NDArray[np.uint64]
_u = np.uint64
_MULTIPLIERS, _WEYL = (_u(0xD2511F53), _u(0xCD9E8D57)), (_u(0x9E3779B9), _u(0xBB67AE85))
_LOW, _HALF = _u(0xFFFFFFFF), _u(32)


@jit
def philox4x32(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Ten rounds over a counter of four 32-bit words and a key of two, all held in uint64; returns four words."""
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> _HALF) ^ c1 ^ k0, second & _LOW, (first >> _HALF) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


@jit
def uniform(seed: Any, counter: Any, dimension: int) -> Any:
    """Draw one number in the open interval (0, 1) for uint64 seed and counter (step index)."""
    words = philox4x32(
        counter & _LOW, counter >> _HALF, _u(dimension // 4), _u(0), seed & _LOW, seed >> _HALF
    )  # fmt: skip
    # The top 23 bits, centred: exact in float32 and never 0 or 1.
    return (np.float32(words[dimension % 4] >> _u(9)) + np.float32(0.5)) * np.float32(2.0**-23)


@Kernel
def _fill(seeds: U64, counters: U64, draws: NDArray[np.float32]) -> None:
    for row in range(draws.shape[0]):
        for dimension in range(draws.shape[1]):
            draws[row, dimension] = uniform(seeds[row], counters[row], dimension)


def uniforms(seeds: U64, counters: U64, num: int) -> NDArray[np.float32]:
    """Draw ``[B, num]`` numbers in the open interval (0, 1): seeds and counters (step indices) ``[B]``, uint64."""
    draws = np.empty((len(seeds), num), np.float32)
    _fill(seeds, counters, draws)
    return draws
