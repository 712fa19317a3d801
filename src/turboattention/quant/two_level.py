"""Two-level metadata: one float16 number for a page, one byte for each scale and for each zero.

``scale = page_scale * scale_code / 255`` and ``zero = page_zero * zero_code / 127``. The same shape as stage 2 of
FlashQ (arXiv 2412.08585), but the codes come from the 16-bit values directly, so that outlier channels cost the others
nothing.
"""

import torch
from torch import Tensor

from turboattention.checks import to_float16
from turboattention.quant.affine import divided

SCALE_STEPS = 255
ZERO_STEPS = 127
LARGEST_BITS = 0x7BFF  # the largest float16, 65504
SMALLEST = 2.0**-24  # of float16, subnormal: what a page scale can be without being zero


def page_maximum(x: Tensor, name: str) -> Tensor:
    """Largest magnitude of each page ``[..., n]`` -> ``[..., 1]`` float16, rounded up so that nothing exceeds it."""
    exact = x.abs().amax(-1, keepdim=True)
    rounded = to_float16(name, exact)
    short = rounded.float() < exact
    # The next float16 of a number that is not negative has the next bit pattern.
    bits = rounded.view(torch.int16)
    return torch.where(short, (bits + 1).clamp_max(LARGEST_BITS), bits).view(torch.float16)


def round_scales(scale: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Scales ``[..., n]`` -> (page scale float16 ``[..., 1]``, uint8 codes ``[..., n]``), 1 to 255, to nearest."""
    page = page_maximum(scale, name)
    codes = (scale / page.float().clamp_min(SMALLEST) * SCALE_STEPS).round().clamp(1, SCALE_STEPS)
    return page, codes.to(torch.uint8)


def expand_scales(page: Tensor, codes: Tensor) -> Tensor:
    """The float32 scales that the codes stand for."""
    return page.float() * divided(codes.float(), SCALE_STEPS)


def round_zeros(zero: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Zeros ``[..., n]`` -> (page zero float16 ``[..., 1]``, codes int8 ``[..., n]`` from -127 to 127)."""
    page = page_maximum(zero, name)
    codes = (zero / page.float().clamp_min(SMALLEST) * ZERO_STEPS).round()
    return page, codes.clamp(-ZERO_STEPS, ZERO_STEPS).to(torch.int8)


def expand_zeros(page: Tensor, codes: Tensor) -> Tensor:
    """The float32 zeros that the codes stand for."""
    return page.float() * divided(codes.float(), ZERO_STEPS)
