"""Matrix products by the CPU's faster library: oneDNN where it is there and the matrices are large, else torch's own.

Measured for float32 on one AVX-512 thread of an AMD EPYC: 200 to 230 GFLOP/s beside 60 to 100 of MKL, which torch
uses. Where MKL is as fast, nothing is lost. Other devices and dtypes take torch's product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_mkldnn: Any = torch.ops.mkldnn
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(_mkldnn, "_linear_pointwise")
_MIN_WEIGHT_ELEMENTS = 2**14
"""Below this the call costs more than the product gains."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b``: ``[M, K]``, ``[K, N]`` -> ``[M, N]``. No gradient flows through it."""
    if _pays(a, b):
        return _onednn(a, b.t())
    return torch.mm(a, b)


def multiplier(b: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``a -> a b`` for a matrix ``[K, N]`` that many ``[M, K]`` are multiplied with. No gradient flows."""
    if b.numel() >= 2 * _MIN_WEIGHT_ELEMENTS and _pays(b, b):
        packed = _mkldnn._reorder_linear_weight(b.t().contiguous())
        return lambda a: _onednn(a, packed)
    return lambda a: torch.mm(a, b)


class Linear(nn.Linear):
    """``x Wᵀ + b`` as ``nn.Linear`` computes it, faster for whole sequences and their gradients."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., F]`` -> ``[..., D]``."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x Wᵀ + b``: ``[..., F]``, ``[D, F]``, ``[D]`` -> ``[..., D]``. Batches without time are left to torch."""
    if x.dim() < 3 or not _pays(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Strides that oneDNN has no kernel for cost a factor of a thousand, without a word.
    if weight.layout == torch.strided and not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return _mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def _pays(a: Tensor, b: Tensor) -> bool:
    return _AVAILABLE and a.device.type == "cpu" and a.dtype == torch.float32 and b.numel() >= _MIN_WEIGHT_ELEMENTS


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        flat = grad_outputs[0].flatten(0, -2)
        d_x = product(flat, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return d_x, product(flat.t(), x.flatten(0, -2)), flat.sum(dim=0)
