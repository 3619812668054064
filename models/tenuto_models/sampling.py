"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A draw is a pure function of (seed, step index, dimension). Nothing is stored, so a retried or replayed step draws the
same numbers, whichever batch it is in. Vectorised over rows in numpy; called on the host, a few numbers per row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUND_A, _ROUND_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_A, _WEYL_B = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)

U64 = NDArray[np.uint64]


def philox4x32(counter: tuple[U64, U64, U64, U64], key: tuple[U64, U64]) -> tuple[U64, U64, U64, U64]:
    """Ten rounds over arrays of 32-bit words held in uint64: four counter words, two key words -> four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = (b >> _HALF) ^ c1 ^ k0, b & _LOW, (a >> _HALF) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _WEYL_A) & _LOW, (k1 + _WEYL_B) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: U64, counters: U64, num: int) -> NDArray[np.float32]:
    """Draw ``[B, num]`` numbers in the open interval (0, 1): seeds ``[B]``, counters (step indices) ``[B]``, uint64."""
    blocks = np.arange((num + 3) // 4, dtype=np.uint64)[None, :]
    seeds, counters, zero = seeds[:, None], counters[:, None], np.zeros((1, 1), np.uint64)
    words = philox4x32((counters & _LOW, counters >> _HALF, blocks, zero), (seeds & _LOW, seeds >> _HALF))
    stacked = np.stack(np.broadcast_arrays(*words), axis=2).reshape(len(seeds), -1)[:, :num]
    # The top 23 bits, centred: exact in float32 and never 0 or 1.
    return ((stacked >> np.uint64(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
