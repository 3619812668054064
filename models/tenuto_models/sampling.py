"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A draw is a pure function of (seed, step index, dimension). Nothing is stored, so a retried or replayed step draws the
same numbers, whichever batch it is in. Vectorised over rows in numpy; called on the host, a few numbers per row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)

U64 = NDArray[np.uint64]


def philox4x32(counter: U64, key: U64) -> U64:
    """Ten rounds over 32-bit words held in uint64: counters ``[4, ...]``, keys ``[2, ...]`` -> words ``[4, ...]``."""
    lead = (slice(None),) + (None,) * (key.ndim - 1)
    keys = (key + _ROUNDS[(..., *(None,) * key.ndim)] * _WEYL[lead]) & _LOW
    # The two words that are multiplied, and the two that are mixed in.
    even, odd = counter[0::2], counter[1::2]
    for round_key in keys:
        product = even * _MULTIPLIERS[lead]
        even, odd = (product[::-1] >> _HALF) ^ odd ^ round_key, product[::-1] & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(seeds: U64, counters: U64, num: int) -> NDArray[np.float32]:
    """Draw ``[B, num]`` numbers in the open interval (0, 1): seeds and counters (step indices) ``[B]``, uint64."""
    blocks = (num + 3) // 4
    counter = np.zeros((4, len(seeds), blocks), np.uint64)
    counter[0], counter[1], counter[2] = (counters & _LOW)[:, None], (counters >> _HALF)[:, None], np.arange(blocks)
    words = philox4x32(counter, np.stack([seeds & _LOW, seeds >> _HALF])[:, :, None])
    # [4, B, blocks] -> [B, 4 blocks], the words of a block side by side.
    rows = words.transpose(1, 2, 0).reshape(len(seeds), -1)[:, :num]
    # The top 23 bits, centred: exact in float32 and never 0 or 1.
    return ((rows >> np.uint64(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
