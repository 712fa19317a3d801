"""What attention reads: the cache of one layer as a view that owns nothing."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turboattention.errors import invalid
from turboattention.quant.layout import PageLayout


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of a layer that share one page layout.

    pages: uint8 ``[batch, len(heads), pages, layout.nbytes]``.
    """

    layout: PageLayout
    heads: tuple[int, ...]
    pages: Tensor


@dataclass(frozen=True)
class CachedKV:
    """All tokens of one layer, oldest first: full pages, then the exact tail (recent window, open page, own chunk).

    groups: every KV head is in exactly one group; empty while nothing has been compressed.
    page_tokens: tokens in full pages.
    tail_key, tail_value: ``[batch, kv_heads, tokens, head_dim]``.
    sink_key, sink_value: exact ``[batch, kv_heads, sinks, head_dim]`` of the first tokens of each sequence, read
        instead of their codes; None without sinks.
    starts: int64 ``[batch]``, number of left-padding tokens of each row; None without padding.
    """

    groups: tuple[HeadGroup, ...]
    page_tokens: int
    tail_key: Tensor
    tail_value: Tensor
    sink_key: Tensor | None = None
    sink_value: Tensor | None = None
    starts: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of the cache, padding included."""
        return self.page_tokens + self.tail_key.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.tail_key.shape[1]

    def visible(self, queries: int, causal: bool, window: int | None = None) -> Tensor | None:
        """bool ``[batch or 1, queries, length]``: which tokens each of the last ``queries`` tokens may attend to.

        window: only that many last tokens, each token's own included.
        """
        columns = torch.arange(self.length, device=self.tail_key.device)
        # Where each query is: before the first token for those that are more than the tokens (not causal).
        rows = torch.arange(self.length - queries, self.length, device=self.tail_key.device)[:, None]
        mask: Tensor | None = None
        if causal and queries > 1:
            mask = columns <= rows
            mask = mask[None]
        if window is not None:
            near = columns > rows - window
            mask = near[None] if mask is None else mask & near
        if self.starts is not None:
            real = columns >= self.starts[:, None]
            mask = real[:, None, :] if mask is None else mask & real[:, None, :]
        return mask

    def row(self, index: int) -> "CachedKV":
        """One sequence, as a batch of one; copies nothing."""
        one = slice(index, index + 1)
        groups = tuple(replace(group, pages=group.pages[one]) for group in self.groups)
        sink_key, sink_value, starts = (
            None if x is None else x[one] for x in (self.sink_key, self.sink_value, self.starts)
        )
        tail = self.tail_key[one], self.tail_value[one]
        return CachedKV(groups, self.page_tokens, *tail, sink_key, sink_value, starts)

    def split(self, tokens: int) -> tuple["CachedKV", Tensor, Tensor]:
        """The cache before its newest ``tokens`` tokens, and exact K and V of these; copies nothing.

        Raises InvalidInputError where some of them are already in pages.
        """
        kept = self.tail_key.shape[2] - tokens
        if kept < 0:
            raise invalid("tokens", f"at most {self.tail_key.shape[2]} (those not yet in pages)", tokens)
        prefix = replace(self, tail_key=self.tail_key[:, :, :kept], tail_value=self.tail_value[:, :, :kept])
        return prefix, self.tail_key[:, :, kept:], self.tail_value[:, :, kept:]

    def sink_columns(self) -> tuple[Tensor, Tensor]:
        """Columns ``[batch, sinks]`` of the sink tokens, and whether each lies in a full page."""
        if self.sink_key is None:
            raise ValueError("the cache has no sink tokens")
        batch, _, sinks, _ = self.sink_key.shape
        columns = torch.arange(sinks, device=self.sink_key.device).expand(batch, sinks)
        if self.starts is not None:
            columns = columns + self.starts[:, None]
        # A row with fewer real tokens than sinks has columns past the end: wrapped onto its padding, so that the
        # columns of a row stay distinct (they are written to) and nothing reads them (they are not in a page).
        return columns % self.length, columns < self.page_tokens
