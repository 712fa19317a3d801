"""What the codes of pages did to exact values: how many were clipped, how many are at an end of their range."""

from typing import NamedTuple

import torch
from torch import Tensor

from turboattention.config import TensorFormat
from turboattention.quant.affine import TINY, levels
from turboattention.quant.codec import Side, decode_pages
from turboattention.quant.layout import PageLayout
from turboattention.quant.rotation import rotate


class CodeRates(NamedTuple):
    """Counts of K or V. clipped: more than half a step outside of the range; saturated: at its first or last code."""

    values: int
    clipped: int
    saturated: int


def code_rates(layout: PageLayout, pages: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> dict[str, CodeRates]:
    """Of ``key`` and ``value``, for those stored below 16 bits.

    pages: uint8 ``[pages, layout.nbytes]`` of one head. key, value: exact ``[pages, page_size, head_dim]``.
    valid: bool ``[pages, page_size]``; the others (padding, sinks) were no part of a range.
    """
    decoded = decode_pages(layout, pages)
    found = {}
    for name, side, fmt, x in (("key", decoded.key, layout.key, key), ("value", decoded.value, layout.value, value)):
        if fmt.bits < 16:
            found[name] = _rates(side, fmt, rotate(x.float()) if fmt.rotated else x.float(), valid)
    return found


def _rates(side: Side, fmt: TensorFormat, x: Tensor, valid: Tensor) -> CodeRates:
    groups = side.scale.shape[-1]
    spread = x.shape[-1] // groups if groups > 1 else 1
    scale, zero = (s.repeat_interleave(spread, -1) if spread > 1 else s for s in (side.scale, side.zero))
    codes = side.codes.float()
    top, step = torch.full_like(x, levels(fmt.bits)), torch.ones_like(x)
    if side.refinement is not None:
        channels, fine, unit = side.refinement
        index = channels.unsqueeze(-2).expand(*x.shape[:-1], -1)
        codes = codes.scatter_add(-1, index, (fine * unit).transpose(-2, -1))
        top = top.scatter(-1, index, levels(fmt.bits + fmt.refined_bits) * unit)
        step = step.scatter(-1, index, unit)
    position = (x - zero) / scale.clamp_min(TINY)
    outside = (position < -step / 2) | (position > top + step / 2)
    ends = (codes <= 0) | (codes >= top)
    counted = valid.unsqueeze(-1).expand_as(x)
    return CodeRates(int(counted.sum()), int((outside & counted).sum()), int((ends & counted).sum()))
