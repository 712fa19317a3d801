"""FlashQ, the paper's progressive quantisation (arXiv 2412.08585, section 3), as a readable definition.

Stage 1: symmetric INT8 of a 64-token tile of one head, scale = max|x| / 119. Stage 2: per channel of the tile, unsigned
2- to 4-bit codes of those integers, with an integer scale and the channel's minimum as integer offset: the only
convention whose re-expansion ``code * scale + offset`` cannot leave INT8 at 2 bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from turboattention.checks import to_float16
from turboattention.quant.affine import TINY, divided, levels

STAGE1_LIMIT = 119
INT8_LIMIT = 127


class Stage1(NamedTuple):
    """An INT8 tile and its scale."""

    codes: Tensor  # int8 [..., tokens, channels]
    scale: Tensor  # float16 [..., 1, 1]


class Stage2(NamedTuple):
    """Low-bit codes of an INT8 tile with integer metadata per channel."""

    codes: Tensor  # uint8 [..., tokens, channels]
    scale: Tensor  # uint8 [..., 1, channels], 1 .. 119
    offset: Tensor  # int8 [..., 1, channels]


def quantize_stage1(x: Tensor) -> Stage1:
    """INT8 codes of tiles ``[..., tokens, channels]``."""
    scale = to_float16("tile scale", divided(x.float().abs().amax((-2, -1), keepdim=True), STAGE1_LIMIT))
    return Stage1(quantize_with_scale(x, scale), scale)


def quantize_with_scale(x: Tensor, scale: Tensor) -> Tensor:
    """INT8 codes with a given scale; larger values are clamped (the paper's decode buffer with its universal scale)."""
    codes = (x.float() / scale.float().clamp_min(TINY)).round()
    return codes.clamp(-STAGE1_LIMIT, STAGE1_LIMIT).to(torch.int8)


def quantize_stage2(tile: Tensor, bits: int) -> Stage2:
    """Codes of an INT8 tile ``[..., tokens, channels]``, per channel."""
    x = tile.float()
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    # Rounded up, so that the largest value of the channel still has a code.
    scale = divided(high - low, levels(bits)).ceil().clamp_min(1)
    codes = ((x - low) / scale).round().clamp(0, levels(bits))
    return Stage2(codes.to(torch.uint8), scale.to(torch.uint8), low.to(torch.int8))


def expand_stage2(stage2: Stage2) -> Tensor:
    """Back to INT8 in integer arithmetic, as the paper feeds its INT8 products."""
    tile = stage2.codes.to(torch.int16) * stage2.scale.to(torch.int16) + stage2.offset.to(torch.int16)
    return tile.to(torch.int8)


def head_priority(x: Tensor) -> Tensor:
    """Priority of each head of ``x`` ``[batch, heads, tokens, channels]``: gap x standard deviation, ``[heads]``.

    Gap is the value range of the head, the deviation is that of its channel ranges; averaged over the batch.
    """
    values = x.float()
    high, low = values.amax(-2), values.amin(-2)
    gap = high.amax(-1) - low.amin(-1)
    return (gap * (high - low).std(-1, correction=0)).mean(0)


def low_priority_heads(priority: Tensor, share: float) -> list[int]:
    """Indices of the ``floor(share * heads)`` heads of lowest priority, ascending."""
    count = int(share * priority.numel())
    return sorted(priority.argsort(stable=True)[:count].tolist())
