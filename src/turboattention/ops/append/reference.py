"""The definition of append: which pages are compressed when, from which tokens, and which do not count for ranges."""

import torch
from torch import Tensor

from turboattention.quant.codec import encode_pages
from turboattention.quant.layout import PageLayout


def full_pages(tail_tokens: int, page_size: int, keep: int) -> int:
    """Pages that the oldest tokens of the tail fill, the ``keep`` newest tokens left alone."""
    return max(0, tail_tokens - keep) // page_size


def real_tokens(first: int, count: int, starts: Tensor | None, sinks: int, device: torch.device) -> Tensor | None:
    """bool ``[batch or 1, count]``: tokens ``first ..`` that are neither padding nor sinks; None when all are."""
    columns = torch.arange(first, first + count, device=device)
    if starts is None:
        return (columns >= sinks)[None] if first < sinks else None
    begin = starts[:, None] + sinks
    return columns >= begin


def compress_pages(
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    tile_scales: tuple[Tensor, Tensor] | None = None,
    query_power: Tensor | None = None,
) -> Tensor:
    """Compress the tokens of whole pages.

    key, value: ``[batch, heads, pages * page_size, head_dim]``; valid: bool ``[batch or 1, tokens]`` from
        `real_tokens`.
    tile_scales, query_power: see `encode_pages`, here ``[batch, heads, 1, 1]`` and ``[batch, heads, head_dim]``.
    Returns uint8 ``[batch, heads, pages, layout.nbytes]``.
    """
    size = layout.page_size
    mask = None if valid is None else valid.unflatten(-1, (-1, size))[:, None].expand(*key.shape[:2], -1, -1)
    scales = None if tile_scales is None else (tile_scales[0].unsqueeze(2), tile_scales[1].unsqueeze(2))
    power = None if query_power is None else query_power.unsqueeze(2)
    return encode_pages(layout, key.unflatten(2, (-1, size)), value.unflatten(2, (-1, size)), mask, scales, power)


def add_query_power(power: Tensor | None, q: Tensor, kv_heads: int, real: Tensor | None) -> Tensor:
    """Add the squares of new queries to the running sum that chooses refined channels.

    power: float32 ``[batch, kv_heads, head_dim]`` or None; q: ``[batch, heads, queries, head_dim]``; real: bool
    ``[batch, queries]`` without padding, or None.
    """
    squares = q.float().square()
    if real is not None:
        squares = torch.where(real[:, None, :, None], squares, 0.0)
    batch, heads, queries, dim = q.shape
    # One sum over heads and queries: it costs less than two, which shows in a decode step on a CPU.
    new: Tensor = squares.reshape(batch, kv_heads, heads // kv_heads * queries, dim).sum(2)
    return new if power is None else power + new


def gather_sinks(sinks: Tensor, tokens: Tensor, first: int, starts: Tensor | None) -> Tensor:
    """Copy those of ``tokens`` (positions ``first ..``) that are sinks of their row into ``sinks``.

    sinks: ``[batch, heads, sink_tokens, head_dim]``, unfilled slots hold anything; tokens: ``[batch, heads, n,
        head_dim]``.
    """
    batch, heads, slots, dim = sinks.shape
    columns = torch.arange(slots, device=tokens.device).expand(batch, slots)
    columns = columns - first if starts is None else columns + starts[:, None] - first
    here = (columns >= 0) & (columns < tokens.shape[2])
    index = columns.clamp(0, tokens.shape[2] - 1)[:, None, :, None].expand(batch, heads, slots, dim)
    return torch.where(here[:, None, :, None], tokens.gather(2, index).to(sinks.dtype), sinks)
