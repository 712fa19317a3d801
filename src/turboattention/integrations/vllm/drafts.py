"""Sequences of a few new tokens each, most of them drafts: as rows of equal width, and back.

vLLM offers a block to others once its tokens are accepted, also when the sequence ends with them, so a page is written
in the step that fills it. A draft may be taken back after that, so the tokens stay in the tail too: the page is
written again when one of them changes, and nothing reads it before. What a step reads as codes ends with the first new
token, which is never a draft.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from turboattention.integrations.vllm.settings import PAGE_TOKENS
from turboattention.integrations.vllm.transfer import to_device
from turboattention.ops.common.paged_kv import PagedKV


@dataclass(frozen=True)
class Drafts:
    """Rows ``[sequences, width]`` of the packed tokens of a step.

    left, right: int64 ``[sequences, width]``, the token in each place when rows are flush left (for appends) or right
        (for queries, because causal attention counts back from the end); places beyond a row repeat a token of it.
    packed: int64 ``[tokens]``, the place of each token in rows flush right.
    All None where every row is full: then a CUDA graph needs no index. none: int32 zeros ``[sequences]``.
    """

    width: int
    none: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    packed: Tensor | None = None

    @classmethod
    def of(cls, counts: "np.ndarray[Any, Any]", none: Tensor) -> "Drafts":
        """Rows of ``counts`` new tokens (0 for padding), the indices on the device of ``none``."""
        width = int(counts.max())
        if (counts == width).all():
            return cls(width, none)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        place = np.arange(width)
        last = np.maximum(counts - 1, 0)
        tokens = int(counts.sum())
        left = starts[:, None] + np.minimum(place, last[:, None])
        right = starts[:, None] + np.maximum(place - (width - counts)[:, None], 0)
        row = np.repeat(np.arange(len(counts)), counts)
        packed = row * width + (width - counts[row]) + (np.arange(tokens) - starts[row])
        index = [np.minimum(x, tokens - 1) for x in (left, right)] + [packed]
        return cls(width, none, *(to_device(x, none.device) for x in index))

    def rows(self, x: Tensor, index: Tensor | None) -> Tensor:
        """``[tokens, heads, head_dim]`` as ``[sequences, heads, width, head_dim]``; index: left or right."""
        rows = x.unflatten(0, (-1, self.width)) if index is None else x[index]
        return rows.transpose(1, 2)

    def tokens(self, rows: Tensor) -> Tensor:
        """The opposite of `rows` with right: the real tokens, packed."""
        x = rows.transpose(1, 2).flatten(0, 1)
        return x if self.packed is None else x[self.packed]


def tail_capacity(draft_tokens: int) -> int:
    """Slots of the open-page pool: a page, and room for drafts behind it."""
    return PAGE_TOKENS + -(-draft_tokens // 16) * 16


def append_drafts(
    append: Callable[..., None],
    view: PagedKV,
    new: tuple[Tensor, Tensor],
    *,
    after: Tensor,
    counts: Tensor,
    none: Tensor,
    fault: Tensor,
    query_power: Tensor | None,
) -> None:
    """Put new tokens into the tail, and pages that are full with them into the pools, from the tail.

    append: an implementation of `append_paged`. view: the cache before the step, page_tokens all full pages of its
        lengths. new: K and V ``[sequences, kv_heads, width, head_dim]`` flush left, the first ``counts`` of a row real.
    after: lengths with all of them. none: zeros like counts.
    """
    append(view, *new, when="before", fault=fault, counts=counts)
    first = [x[:, :, :1] for x in new]
    append(replace(view, lengths=after), *first, when="before", fault=fault, counts=none, query_power=query_power)
