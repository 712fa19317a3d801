"""Hadamard rotation over the channels of a head.

Spreads an outlier over all channels, which helps formats whose scale spans the channels (per token). It is orthogonal,
so ``q . k`` and, after rotating back once per query, ``p . v`` do not change.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def _hadamard_float64(dim: int) -> Tensor:
    block = dim & -dim  # largest power of two that divides dim: 80 -> 16, 96 -> 32
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    matrix: Tensor = torch.block_diag(*[h / block**0.5] * (dim // block))
    return matrix


def hadamard(dim: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """The symmetric orthogonal matrix ``[dim, dim]``; block-diagonal where ``dim`` is not a power of two."""
    return _hadamard_float64(dim).to(device=device, dtype=dtype)


def rotate(x: Tensor) -> Tensor:
    """Rotate the last dimension; its own inverse, because the matrix is symmetric.

    A butterfly of additions, then one product with 1 / sqrt(block): every implementation that keeps to this order has
    the same bits, which no order-free matrix product can promise.
    """
    block = x.shape[-1] & -x.shape[-1]
    size = 1
    while size < block:
        first, second = x.unflatten(-1, (-1, 2, size)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        size *= 2
    rotated: Tensor = x * block**-0.5
    return rotated
