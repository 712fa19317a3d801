"""How far codes can move the output of a head, from the scales of its pages alone, and how far they did.

With e the largest error of a score that the scales of K allow, and the weights p' of the changed scores, for a query

    |o' - o| <= sum over tokens of p'_t |dv_t|  +  tanh(e / 2) * (largest distance between two values)

because scores that move by at most e change the weights by at most tanh(e / 2) in total variation. Norms are
Euclidean, so that the rotation of V changes nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from turboattention.calibration.capture import Captured
from turboattention.calibration.levels import BASE
from turboattention.calibration.stored import PAGE, page_rows, stored_pages, whole_pages
from turboattention.config import TensorFormat
from turboattention.quant.affine import SEARCH_SHARES, levels
from turboattention.quant.codec import Side, decode_pages, expand_pages
from turboattention.quant.layout import PageLayout
from turboattention.quant.two_level import SCALE_STEPS, ZERO_STEPS


class HeadBound(NamedTuple):
    """Errors of one KV head's output relative to its size, averaged over query heads and queries.

    excess: the largest difference seen - bound of a single query: below zero when the bound holds for all.
    """

    bound: float
    seen: float
    excess: float


def head_bound(captured: Captured, head: int, key_format: TensorFormat, value_format: TensorFormat) -> HeadBound:
    """Bound and error of a head whose pages have these formats (below 16 bits); queries of the first page left out."""
    whole = whole_pages(captured)
    group = whole.query.shape[1] // whole.key.shape[1]
    dim = whole.key.shape[3]
    layout = PageLayout(PAGE, dim, key_format, value_format)
    key_rows, value_rows, power = page_rows(whole)
    pages = stored_pages(layout, *(x[:, head : head + 1] for x in (key_rows, value_rows, power)))[:, 0]
    decoded = decode_pages(layout, pages)
    stored_key, stored_value = (x.flatten(0, 1) for x in expand_pages(layout, pages))
    margin = _margin(layout, pages, "key", decoded.key, key_format)  # [pages, 1, head_dim]
    token = _margin(layout, pages, "value", decoded.value, value_format).expand(-1, PAGE, dim)
    token_error = token.square().sum(-1).sqrt().flatten()  # [tokens]

    query = whole.query[0, head * group : (head + 1) * group, PAGE:].float()
    key, value = (x[0, head].half().float() for x in (whole.key, whole.value))  # as the open page holds them
    rows = torch.arange(PAGE, key.shape[0], device=key.device)[:, None]
    columns = torch.arange(key.shape[0], device=key.device)
    read = (columns // PAGE < rows // PAGE) & (columns >= BASE.sink_tokens)
    hidden = columns > rows
    scores = query @ key.T * whole.scale
    changed = torch.where(read, query @ stored_key.T * whole.scale, scores)
    exact = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    weights = changed.masked_fill(hidden, -torch.inf).softmax(-1)
    out = exact @ value
    moved = (weights * read) @ stored_value + (weights * ~read) @ value

    # A page counts for a query only when the query reads it.
    page_scores = query.abs() @ margin[:, 0].T * whole.scale  # [group, queries, pages]
    earlier = torch.arange(margin.shape[0], device=key.device) < rows // PAGE
    score_error = page_scores.masked_fill(~earlier, 0.0).amax(-1)
    centre = value.mean(0)
    spread = 2 * (value - centre).square().sum(-1).sqrt().cummax(0).values[PAGE:]
    bound = (weights * read) @ token_error + (score_error / 2).tanh() * spread
    size = out.square().sum(-1).mean().sqrt()
    seen = (moved - out).square().sum(-1).sqrt()
    return HeadBound(float(bound.mean() / size), float(seen.mean() / size), float(((seen - bound) / size).max()))


def _margin(layout: PageLayout, pages: Tensor, side: str, decoded: Side, fmt: TensorFormat) -> Tensor:
    """Largest distance of a value from what its code stands for: ``[pages, tokens or 1, channels or 1]``.

    Half a step; where ranges are searched, also what lies outside of the range; and the rounding of scale and zero.
    """
    scale = decoded.scale
    step, count = scale.clone(), torch.full_like(scale, levels(fmt.bits))
    if decoded.refinement is not None:
        channels, unit = decoded.refinement.channels.unsqueeze(-2), decoded.refinement.unit
        step.scatter_(-1, channels, scale.gather(-1, channels) * unit)
        fine = torch.full_like(channels, levels(fmt.bits + fmt.refined_bits), dtype=count.dtype)
        count.scatter_(-1, channels, fine)
    outside = (1 / min(SEARCH_SHARES) - 1) / 2 if fmt.search else 0.0
    scale_unit = layout.read(pages, f"{side}_page_scale").float().unsqueeze(-1) / SCALE_STEPS
    # A step may have been rounded down by half a unit over all codes; the smallest scale stands for smaller ones.
    rounded = scale_unit / 2 * 2**fmt.bits
    zero = torch.zeros_like(scale_unit)
    if not fmt.symmetric:
        zero = layout.read(pages, f"{side}_page_zero").float().unsqueeze(-1) / ZERO_STEPS / 2
    beyond = (step * count + 2 * rounded) * outside
    margin: Tensor = step / 2 + beyond + rounded + zero
    return margin
