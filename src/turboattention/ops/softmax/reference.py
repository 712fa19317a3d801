"""Softmax in low precision: the paper's SAS, and base 2 with exact skip of tiles. Maths and errors: README.md beside.

Scores come in natural-log units and may hold -inf where masked. Everything is computed in float32.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from turboattention.errors import invalid

# arXiv 2412.08585: e^-x = table(floor x) * cubic(fraction of x), and 0 beyond x = 6.
SAS_LIMIT = 6.0
SAS_TABLE = tuple(math.exp(-k) for k in range(7))
SAS_CUBIC = (0.9996, -0.9922, 0.4626, -0.1025)  # of t^0 .. t^3

# Minimax fit of 2^t on [0, 1) for the relative error (8.6e-5) with the value 1 at t = 0.
EXP2_CUBIC = (1.0, 0.695117295, 0.227643535, 0.077068031)
EXP2_LOWEST = -127.0
# Cubic and float32 together may exceed 2^x by 8.6e-5; in log2 units that is 1.2e-4.
SKIP_MARGIN = 2e-4
PROBABILITY_LEVELS = 255


class SasWeights(NamedTuple):
    """Weights before normalisation: softmax = weights / total."""

    weights: Tensor  # float32, the shape of the scores
    maximum: Tensor  # float32, size 1 along the reduced dimension; -inf where all is masked
    total: Tensor  # float32, the sum of the weights; 0 where all is masked


class Base2Softmax(NamedTuple):
    """Normalised weights and what was left out."""

    weights: Tensor  # float32 [..., rows, keys]
    skipped: int  # tiles without any weight, counted per leading index


class OnlineAttention(NamedTuple):
    """Weighted values with what is needed to merge them with other parts of the sequence."""

    output: Tensor  # float32 [..., rows, channels]; 0 where all is masked
    lse: Tensor  # float32 [..., rows], natural log; -inf where all is masked
    skipped: int  # tiles without any weight, counted per leading index


class _Tile(NamedTuple):
    """One key tile of the online softmax, after it was seen."""

    keys: slice
    weights: Tensor | None  # [..., rows, tile], in units of 1 / levels; None where the tile was not computed
    rescale: Tensor  # [..., rows, 1], for everything summed before
    maximum: Tensor  # [..., rows, 1], log2 units
    skipped: int


def sas_exp(x: Tensor) -> Tensor:
    """``e^-x`` for ``x >= 0`` by the paper's table and cubic; exactly 0 for ``x > 6`` (also for infinity)."""
    inside = x.float().clamp(0.0, SAS_LIMIT)
    whole = inside.floor()
    table = torch.tensor(SAS_TABLE, dtype=torch.float32, device=x.device)
    return torch.where(x > SAS_LIMIT, 0.0, table[whole.long()] * _cubic(inside - whole, SAS_CUBIC))


def sas_weights(scores: Tensor, dim: int = -1, lower_bound: Tensor | None = None) -> SasWeights:
    """SAS weights of one tile.

    lower_bound: running maximum of earlier tiles (size 1 along ``dim``); the weights are relative to the larger of it
        and this tile's maximum, and what was summed before is rescaled by ``sas_exp(maximum - lower_bound)``.
    """
    scores = scores.float()
    maximum = scores.amax(dim, keepdim=True)
    if lower_bound is not None:
        maximum = torch.maximum(maximum, lower_bound)
    weights = sas_exp(_finite(maximum) - scores)
    return SasWeights(weights, maximum, weights.sum(dim, keepdim=True))


def sas_softmax(scores: Tensor, dim: int = -1) -> Tensor:
    """Softmax with `sas_exp`, in the dtype of the scores; rows that are masked entirely give zeros."""
    weights, _, total = sas_weights(scores, dim)
    return (weights / _nonzero(total)).to(scores.dtype)


def exp2_poly(x: Tensor) -> Tensor:
    """``2^x`` for ``x <= 0``: a cubic on the fraction, shifted by the integer part into the exponent.

    Exactly 1 at 0 (the row maximum weighs exactly 1), monotone up to float32 rounding; exactly 0 below -126, where the
    exponent field is 0, hence also at -inf.
    """
    inside = x.float().clamp(EXP2_LOWEST, 0.0)
    whole = inside.floor()
    power = (whole.to(torch.int32) + 127 << 23).view(torch.float32)  # the bits of 2^whole; 0 at -127
    return power * _cubic(inside - whole, EXP2_CUBIC)


def skip_threshold(probability_levels: int | None = PROBABILITY_LEVELS) -> float:
    """Log2 distance to the maximum below which a weight surely rounds to 0."""
    if probability_levels is None:
        return EXP2_LOWEST + 1
    return math.log2(0.5 / probability_levels) - SKIP_MARGIN


def base2_softmax(
    scores: Tensor, tile: int = 64, probability_levels: int | None = PROBABILITY_LEVELS, *, skip: bool = True
) -> Base2Softmax:
    """Softmax of ``scores`` ``[..., rows, keys]`` as `online_base2` weighs its values."""
    weights = torch.zeros_like(scores, dtype=torch.float32)
    total = weights.new_zeros(*scores.shape[:-1], 1)
    skipped = 0
    for step in _online(scores, tile, probability_levels, skip):
        skipped += step.skipped
        if step.weights is None:
            continue
        weights[..., : step.keys.start] *= step.rescale
        weights[..., step.keys] = step.weights
        total = total * step.rescale + step.weights.sum(-1, keepdim=True)
    return Base2Softmax(weights / _nonzero(total), skipped)


def online_base2(
    scores: Tensor,
    values: Tensor,
    tile: int = 64,
    probability_levels: int | None = PROBABILITY_LEVELS,
    *,
    skip: bool = True,
) -> OnlineAttention:
    """``softmax(scores) @ values`` over key tiles with a running maximum.

    scores: ``[..., rows, keys]``, natural-log units.
    values: ``[..., keys, channels]``, leading dimensions broadcastable.
    probability_levels: weights become the integers ``round(levels * 2^(s - m))``; None keeps them unrounded. 255 suits
        peaked attention; over long diffuse rows it loses as much as the paper's cut (README.md).
    skip: leave out tiles whose every weight rounds to 0. The result is the same bit for bit. Such a tile is counted for
        each leading index (one program of a kernel each); here it is not computed when all leading indices agree.
    """
    if values.shape[-2] != scores.shape[-1]:
        raise invalid("values", f"{scores.shape[-1]} keys as in scores", f"shape {tuple(values.shape)}")
    rows = scores.new_zeros(*scores.shape[:-1], 1, dtype=torch.float32)
    output, total, maximum = rows @ values.new_zeros(1, values.shape[-1], dtype=torch.float32), rows, rows - torch.inf
    skipped = 0
    for step in _online(scores, tile, probability_levels, skip):
        skipped += step.skipped
        if step.weights is None:
            continue
        maximum = step.maximum
        total = total * step.rescale + step.weights.sum(-1, keepdim=True)
        output = output * step.rescale + step.weights @ values[..., step.keys, :].float()
    lse = math.log(2.0) * (maximum + (total / (probability_levels or 1)).log2())
    return OnlineAttention(output / _nonzero(total), lse.squeeze(-1), skipped)


def _online(scores: Tensor, tile: int, levels: int | None, skip: bool) -> Iterator[_Tile]:
    """The key tiles in order, each with integer weights relative to the running maximum."""
    if scores.dim() < 2:
        raise invalid("scores", "at least 2 dimensions [..., rows, keys]", f"shape {tuple(scores.shape)}")
    if tile < 1:
        raise invalid("tile", "1 or more keys", tile)
    if levels is not None and levels < 1:
        raise invalid("probability_levels", "1 or more, or None", levels)
    threshold = skip_threshold(levels)
    before = torch.full((*scores.shape[:-1], 1), -torch.inf, dtype=torch.float32, device=scores.device)
    for start in range(0, scores.shape[-1], tile):
        keys = slice(start, min(start + tile, scores.shape[-1]))
        part = scores[..., keys].float() * math.log2(math.e)
        largest = part.amax(-1, keepdim=True)
        maximum = torch.maximum(before, largest)
        # One masked entirely so far is -inf minus -inf: NaN, which compares as dead.
        dead = ~(largest - maximum >= threshold).any(-2)
        skipped = int(dead.sum()) if skip else 0
        # One exact exponential for a row and tile: a cubic here would only add error.
        rescale = torch.exp2(before - _finite(maximum))
        if skipped == dead.numel():
            yield _Tile(keys, None, rescale, maximum, skipped)
        else:
            weights = exp2_poly(part - _finite(maximum))
            yield _Tile(keys, weights if levels is None else (levels * weights).round(), rescale, maximum, skipped)
        before = maximum


def _cubic(t: Tensor, c: tuple[float, float, float, float]) -> Tensor:
    return c[0] + t * (c[1] + t * (c[2] + t * c[3]))


def _finite(maximum: Tensor) -> Tensor:
    """Maximum with 0 for -inf, so that a row masked entirely is not -inf minus -inf."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def _nonzero(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0.0, 1.0)
