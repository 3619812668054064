"""Weightings of the DNC: pure functions, one equation each, after "Hybrid computing using a neural network with
dynamic external memory" (Graves et al. 2016, Methods).

Legend: B rows, N memory cells, W cell size, R read heads. One write head, so its dimension is dropped here.
Departures from the paper, kept for parity with the reference: DELTA in the cosine and as a floor of the usage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenuto_models.dnc.kernels import DELTA


def content_weights(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    """``C(M, k, β) = softmax_N(cos(M, k) β)``: ``[B, K, N]``.

    memory ``[B, N, W]``, keys ``[B, K, W]``, strengths ``[B, K]``; K is R for reading, 1 for writing.
    A zero cell or a zero key has cosine 0.
    """
    dot = keys @ memory.transpose(1, 2)
    norms = keys.norm(dim=2).unsqueeze(2) * memory.norm(dim=2).unsqueeze(1)
    return torch.softmax(dot / (norms + DELTA) * strengths.unsqueeze(2), dim=2)


def usage_after(usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor) -> Tensor:
    """``u = (u + (1-u) ww) ψ``, ``ψ = Π_i (1 - f_i R_i)``, from the previous step's weights: -> ``[B, N]``.

    usage, write_weights ``[B, N]``; read_weights ``[B, R, N]``; free_gates ``[B, R]`` of this step.
    """
    retention = torch.prod(1 - free_gates.unsqueeze(2) * read_weights, dim=1)
    return (usage + (1 - usage) * write_weights) * retention


def allocation_weights(usage: Tensor) -> Tensor:
    """``a[φ_j] = (1 - u'[φ_j]) Π_{i<j} u'[φ_i]`` with φ ascending in ``u' = δ + (1-δ) u``: ``[B, N]`` -> ``[B, N]``.

    Ties are broken by index (stable sort).
    """
    floored = DELTA + (1 - DELTA) * usage
    ascending, order = torch.sort(floored, dim=1, stable=True)
    product = torch.cumprod(ascending, dim=1)
    # Exclusive product: shift by one, the emptiest cell has nothing before it.
    before = torch.nn.functional.pad(product[:, :-1], (1, 0), value=1.0)
    return torch.zeros_like(usage).scatter(1, order, (1 - ascending) * before)


def link_after(link: Tensor, precedence: Tensor, write_weights: Tensor) -> Tensor:
    """``L[i,j] = (1 - ww[i] - ww[j]) L[i,j] + ww[i] p[j]``, diagonal 0: ``[B, N, N]``, old precedence ``[B, N]``."""
    row = write_weights.unsqueeze(2)
    link = (1 - row - write_weights.unsqueeze(1)) * link + row * precedence.unsqueeze(1)
    off_diagonal = 1 - torch.eye(link.shape[1], dtype=link.dtype, device=link.device)
    return link * off_diagonal


def precedence_after(precedence: Tensor, write_weights: Tensor) -> Tensor:
    """``p = (1 - Σ ww) p + ww``: ``[B, N]``."""
    return (1 - write_weights.sum(dim=1, keepdim=True)) * precedence + write_weights
