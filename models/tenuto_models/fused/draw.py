# pyright: reportMissingParameterType=false
# Of kernels: pointers, which no annotation describes.

"""The end of a step as one kernel: actions of categoricals, their log-probabilities, and what is finite.

Legend: B rows, K logits, A action dimensions, each a categorical over the logits from one end to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenuto_models.distributions import ActionDistribution, Categoricals
from tenuto_models.fused.launch import launch
from tenuto_models.policy import PolicyOutput

_MAX_LOGITS = 8192
"""A row's logits are held in registers."""


def can_draw(distribution: ActionDistribution) -> bool:
    """Whether :class:`FusedDraw` is made for such a distribution."""
    return isinstance(distribution, Categoricals) and distribution.num_logits <= _MAX_LOGITS


class FusedDraw:
    """Draws as the distribution it is made from. Keeps the ends of its categoricals on the device."""

    def __init__(self, distribution: ActionDistribution, device: torch.device) -> None:
        assert isinstance(distribution, Categoricals)
        self._ends = torch.tensor([0, *accumulate(distribution.sizes)], dtype=torch.int32, device=device)
        self._starts = distribution.to_space(torch.zeros(1, len(distribution.sizes), dtype=torch.int64))
        self._starts = self._starts.flatten().to(device, torch.int64)

    def __call__(
        self, output: PolicyOutput, uniforms: Tensor, deterministic: Tensor, results: Mapping[str, Tensor]
    ) -> None:
        """Draw with ``uniforms [B, A]``, or take the likeliest where ``deterministic [B]``, and fill the results.

        Those are ``actions [B, *shape]``, ``values [B]``, ``log_probs [B]``, ``logits [B, K]`` and ``finite [B]``:
        whether all of the row's logits and the sum of its value and log-probability are.
        """
        num_rows, num_logits = output.logits.shape
        block = triton.next_power_of_2(num_logits)
        launch(
            _draw, (num_rows,), output.logits.contiguous(), output.value.contiguous(), uniforms, deterministic,
            self._ends, self._starts, *(results[n] for n in ("actions", "values", "log_probs", "logits", "finite")),
            LOGITS=num_logits, PARTS=len(self._starts), BLOCK=block, num_warps=min(max(block // 256, 1), 8),
        )  # fmt: skip


@triton.jit
def _draw(
    logits, value, uniforms, deterministic, ends, starts, actions, values, log_probs, kept_logits, finite,
    LOGITS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    x = tl.load(logits + row * LOGITS + k, mask=k < LOGITS, other=0)
    v, is_greedy = tl.load(value + row), tl.load(deterministic + row) != 0
    log_prob = 0.0
    for part in range(PARTS):
        begin, end = tl.load(ends + part), tl.load(ends + part + 1)
        shifted = tl.where((k >= begin) & (k < end), x, float("-inf"))
        likeliest = tl.argmax(shifted, axis=0)
        shifted -= tl.max(shifted, axis=0)
        e = tl.exp(shifted)
        total = tl.sum(e, axis=0)
        # The first class whose cumulated probability exceeds the uniform; the last takes what rounding leaves.
        passed = (k >= begin) & (k < end - 1) & (tl.load(uniforms + row * PARTS + part) >= tl.cumsum(e / total, axis=0))
        action = tl.where(is_greedy, likeliest, begin + tl.sum(passed.to(tl.int32), axis=0))
        log_prob += tl.sum(tl.where(k == action, shifted, 0.0), axis=0) - tl.log(total)
        tl.store(actions + row * PARTS + part, action - begin + tl.load(starts + part))
    is_finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=0) & (tl.abs(v + log_prob) < float("inf"))
    tl.store(kept_logits + row * LOGITS + k, x, mask=k < LOGITS)
    tl.store(values + row, v)
    tl.store(log_probs + row, log_prob)
    tl.store(finite + row, is_finite != 0)
