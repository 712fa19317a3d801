"""What attention reads of a paged cache: pools of pages, page tables and lengths on the device, nothing on the host.

The form that engines use: sequences of different lengths, pages in any order, and no number that a CUDA graph would
freeze.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turboattention.ops.common.cached_kv import CachedKV, HeadGroup
from turboattention.quant.layout import PageLayout


@dataclass(frozen=True)
class PagedGroup:
    """KV heads of a layer that share one page layout.

    heads: which KV heads, in the order of the table. pool: uint8 ``[pages, layout.nbytes]``, contiguous; a page holds
    one KV head. table: int32 ``[batch, len(heads), max_pages]``, the page of the pool that holds tokens ``i * page_size
    ..`` of a sequence; entries beyond its full pages are never read.
    """

    layout: PageLayout
    heads: tuple[int, ...]
    pool: Tensor
    table: Tensor


@dataclass(frozen=True)
class PagedKV:
    """All tokens of one layer for a batch of sequences of any lengths.

    groups: every KV head is in exactly one group.
    lengths: int32 ``[batch]``, tokens of each sequence, at least 1.
    page_tokens: int32 ``[batch]``, how many of them are in full pages; the others are exact, in the tail.
    tail_key, tail_value: ``[batch, kv_heads, capacity, head_dim]``; token t is in slot ``t % capacity``.
    sink_key, sink_value: exact ``[batch, kv_heads, sinks, head_dim]`` of the first tokens, read instead of their codes
        once these are in a page; None without sinks.
    tail_rows: int32 ``[batch]``, where in the tail each sequence has its row, for tails with rows for more sequences
        than the batch has; None: the same number. Query statistics that go with the cache have the rows of the tail.
    sink_rows: the same for the sinks; two sequences with the same first page may share a row.
    """

    groups: tuple[PagedGroup, ...]
    lengths: Tensor
    page_tokens: Tensor
    tail_key: Tensor
    tail_value: Tensor
    sink_key: Tensor | None = None
    sink_value: Tensor | None = None
    tail_rows: Tensor | None = None
    sink_rows: Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.tail_key.shape[1]


def with_own_rows(kv: PagedKV) -> PagedKV:
    """The same cache with row b of the tail and of the sinks for sequence b: copies where it had others."""
    if kv.tail_rows is None and kv.sink_rows is None:
        return kv
    tail_key, tail_value, sink_key, sink_value = kv.tail_key, kv.tail_value, kv.sink_key, kv.sink_value
    if kv.tail_rows is not None:
        tail_key, tail_value = tail_key[kv.tail_rows], tail_value[kv.tail_rows]
    if kv.sink_rows is not None and sink_key is not None and sink_value is not None:
        sink_key, sink_value = sink_key[kv.sink_rows], sink_value[kv.sink_rows]
    return PagedKV(kv.groups, kv.lengths, kv.page_tokens, tail_key, tail_value, sink_key, sink_value)


@contextmanager
def appending_to_own_rows(kv: PagedKV, query_power: Tensor | None) -> Iterator[tuple[PagedKV, Tensor | None]]:
    """The cache and the query statistics with rows of their own (`with_own_rows`), for an append that knows no others.

    What it has changed in the tail and the sinks is then written where it belongs; sinks only of sequences that had no
    page before: nobody else has theirs.
    """
    own = with_own_rows(kv)
    yield own, query_power if query_power is None or kv.tail_rows is None else query_power[kv.tail_rows]
    if kv.tail_rows is not None:
        kv.tail_key[kv.tail_rows] = own.tail_key
        kv.tail_value[kv.tail_rows] = own.tail_value
    if kv.sink_rows is None or kv.sink_key is None or kv.sink_value is None:
        return
    assert own.sink_key is not None  # as those of kv
    assert own.sink_value is not None
    young = kv.page_tokens == 0
    kv.sink_key[kv.sink_rows[young]] = own.sink_key[young]
    kv.sink_value[kv.sink_rows[young]] = own.sink_value[young]


def sequences_of(kv: PagedKV, first: int, last: int) -> PagedKV:
    """Sequences ``first .. last - 1``; copies nothing."""
    part = slice(first, last)
    groups = tuple(replace(group, table=group.table[part]) for group in kv.groups)
    tail = tuple(x if kv.tail_rows is not None else x[part] for x in (kv.tail_key, kv.tail_value))
    sinks = tuple(
        x if x is None or kv.sink_rows is not None else x[part] for x in (kv.sink_key, kv.sink_value)
    )  # fmt: skip
    rows = (None if x is None else x[part] for x in (kv.tail_rows, kv.sink_rows))
    return PagedKV(groups, kv.lengths[part], kv.page_tokens[part], *tail, *sinks, *rows)


def sequence(kv: PagedKV, index: int) -> CachedKV:
    """Sequence ``index`` of a paged cache as a contiguous view (copies its pages; reads its length on the host)."""
    length, paged = int(kv.lengths[index]), int(kv.page_tokens[index])
    groups = []
    for group in kv.groups:
        pages = group.table[index, :, : paged // group.layout.page_size].long()
        groups.append(HeadGroup(group.layout, group.heads, group.pool[pages][None]))
    slots = torch.arange(paged, length, device=kv.tail_key.device) % kv.tail_key.shape[2]
    row = index if kv.tail_rows is None else int(kv.tail_rows[index])
    tail = (x[row : row + 1, :, slots] for x in (kv.tail_key, kv.tail_value))
    first = index if kv.sink_rows is None else int(kv.sink_rows[index])
    sinks = (None if x is None else x[first : first + 1] for x in (kv.sink_key, kv.sink_value))
    return CachedKV(tuple(groups), paged, *tail, *sinks)
