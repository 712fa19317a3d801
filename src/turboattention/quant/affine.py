"""Affine quantisation to unsigned codes: the definition, for every granularity.

``x ~ code * scale + zero`` with ``code`` in ``0 .. 2^bits - 1``; ``zero`` is the value of code 0. Ties round to even,
as torch.round does.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from turboattention.quant.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerToken

# Shares of the min-max range tried by `search_range`, 1.0, 0.95, .. 0.6, as float32 numbers. Below 0.6 no page of real
# K or V had its optimum (2 bits).
SEARCH_SHARES = tuple((torch.arange(20, 11, -1, dtype=torch.float32) / 20).tolist())
# Errors of the search are added as integers in units of (half range / 4096) ** 2: exact in any order, so that kernels
# choose the same range. At most (0.4 * 4096) ** 2 each, hence int32 has room for the 256 values of a token or channel.
ERROR_STEPS = 4096.0
# Keeps a division by a zero scale (all values equal) defined; far below any float16 scale.
TINY = 1e-12


class Quantized(NamedTuple):
    """Codes with the scales and zeros that belong to them, broadcastable to the codes."""

    codes: Tensor  # uint8, the shape of x
    scale: Tensor  # float32
    zero: Tensor  # float32


def levels(bits: int) -> int:
    """The largest code."""
    return (1 << bits) - 1


def grouped(x: Tensor, granularity: Granularity) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` reshaped so that one scale spans the returned (last) dimensions."""
    match granularity:
        case PerToken():
            return x, (-1,)
        case PerChannel():
            return x, (-2,)
        case PerBlock():
            return x, (-2, -1)
        case PerGroup(size):
            return x.unflatten(-1, (-1, size)), (-1,)


def value_range(x: Tensor, dims: tuple[int, ...], symmetric: bool) -> tuple[Tensor, Tensor]:
    """Smallest and largest value over ``dims`` (kept as size 1); mirrored about zero when ``symmetric``."""
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return low, high


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes (uint8) of ``x`` on a given grid; values outside the grid take its ends.

    A product with the rounded reciprocal: one division for each scale instead of one for each value.
    """
    return ((x - zero) * scale.clamp_min(TINY).reciprocal()).round().clamp(0, levels(bits)).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``code * scale + zero`` in float32."""
    return codes.float() * scale + zero


def divided(x: Tensor, number: float) -> Tensor:
    """``x / number``, rounded once everywhere: torch on CUDA multiplies by the reciprocal of a Python number."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def search_range(x: Tensor, low: Tensor, high: Tensor, dims: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    """The share of the range (about its middle) with the least squared error, per scale; of equal ones the largest.

    Cutting rare extremes makes the steps of all other values smaller: at 2 bits this halves the KL of K (see
    docs/decisions), at 4 bits and above it changes nothing.
    """
    middle, half = (low + high) * 0.5, (high - low) * 0.5
    relative = (x - middle) * half.clamp_min(TINY).reciprocal()  # -1 .. 1
    best_error = torch.full_like(low, torch.iinfo(torch.int32).max, dtype=torch.int64)
    best_share = torch.ones_like(low)
    for share in SEARCH_SHARES:
        position = relative * (levels(bits) / (2 * share)) + levels(bits) / 2  # in steps from code 0
        distance = (position - position.round().clamp(0, levels(bits))) * (2 * share / levels(bits) * ERROR_STEPS)
        error = distance.square().to(torch.int32).sum(dims, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_share = torch.where(better, share, best_share)
    return middle - best_share * half, middle + best_share * half


def quantize(
    x: Tensor, bits: int, granularity: Granularity, *, symmetric: bool = False, search: bool = False
) -> Quantized:
    """Quantise ``x`` ``[..., tokens, channels]`` (any float dtype) with unrounded float32 scales and zeros.

    For PerGroup the results keep the grouped shape ``[..., tokens, groups, size]``; `ungroup` brings it back.
    """
    y, dims = grouped(x.float(), granularity)
    low, high = value_range(y, dims, symmetric)
    if search:
        low, high = search_range(y, low, high, dims, bits)
    scale = divided(high - low, levels(bits))
    return Quantized(encode(y, scale, low, bits), scale, low)


def ungroup(x: Tensor, granularity: Granularity) -> Tensor:
    """Undo the reshape of `grouped`."""
    return x.flatten(-2) if isinstance(granularity, PerGroup) else x
