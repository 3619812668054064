"""Matrix products in tiles of one size, so that a row's result is the same bits in every batch.

A library chooses its kernel, and with it the order of a sum, by the number of rows. Here the order is fixed: K in
steps of one size, never split between programs. That costs speed; the library is the default.

Legend: B rows of a batch, K input features, D output features.
"""

# pyright: reportMissingParameterType=false
# Of kernels: pointers, which no annotation describes.

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor, nn

from tenuto_models.fused.launch import launch

Precision = Literal["ieee", "tf32x3", "tf32"]
"""How factors are multiplied: as float32; on tensor cores, in parts that make up nearly that; rounded to TF32."""

_BLOCK_B, _BLOCK_D, _BLOCK_K = 32, 32, 32


class FixedTileLinear(nn.Module):
    """Computes what the layer that it shares weights with computes. Inference only."""

    def __init__(self, linear: nn.Linear, precision: Precision = "ieee") -> None:
        super().__init__()
        self._weight, self._bias, self._precision = linear.weight.detach(), linear.bias.detach(), precision

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b``: float32 ``[B, K]``, rows any distance apart -> ``[B, D]``."""
        assert x.stride(1) == 1
        outputs, inputs = self._weight.shape
        y = x.new_empty((len(x), outputs))
        launch(
            _linear, (triton.cdiv(len(x), _BLOCK_B), triton.cdiv(outputs, _BLOCK_D)),
            x, self._weight, self._bias, y, len(x),
            STRIDE=x.stride(0), INPUTS=inputs, OUTPUTS=outputs, PRECISION=self._precision,
            BLOCK_B=_BLOCK_B, BLOCK_D=_BLOCK_D, BLOCK_K=_BLOCK_K,
        )  # fmt: skip
        return y


def fix_tiles(module: nn.Module, precision: Precision = "ieee") -> None:
    """Replace every Linear below ``module`` in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, FixedTileLinear(child, precision))
        else:
            fix_tiles(child, precision)


# Specialised by the number of rows, the compiler might order a sum otherwise.
@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x, weight, bias, y, num_rows, STRIDE: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per tile of ``y [B, D]``."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_b, in_d = b < num_rows, d < OUTPUTS
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(0, INPUTS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < INPUTS
        left = tl.load(x + b[:, None] * STRIDE + k[None, :], mask=in_b[:, None] & in_k[None, :], other=0)
        right = tl.load(weight + d[None, :] * INPUTS + k[:, None], mask=in_d[None, :] & in_k[:, None], other=0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    total += tl.load(bias + d, mask=in_d, other=0)[None, :]
    tl.store(y + b[:, None] * OUTPUTS + d[None, :], total, mask=in_b[:, None] & in_d[None, :])
