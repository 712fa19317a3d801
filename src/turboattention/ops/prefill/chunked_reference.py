"""The definition of chunked prefill: a chunk of new tokens over the cache before it and, in INT8, over itself."""

from collections.abc import Iterator

import torch
from torch import Tensor

from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.common.paged_kv import PagedKV, sequence
from turboattention.ops.prefill.int8 import int8_attention, quantise_chunk
from turboattention.ops.prefill.reference import AttentionOutput, merge_attention, prefill_attention
from turboattention.ops.prefill.sequences import Sequences


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: CachedKV | PagedKV | None,
    *,
    scale: float,
    window: int | None = None,
    sequences: Sequences,
    dtype: torch.dtype = torch.float32,
) -> AttentionOutput:
    """What `chunked_prefill` computes, one sequence after the other; arguments as there, which has checked them.

    dtype: in which this computes and returns. Reads lengths on the host.
    """
    out = torch.zeros_like(q, dtype=dtype)
    lse = torch.full((q.shape[1], len(q)) if sequences.is_packed else q.shape[:3], -torch.inf, dtype=dtype).to(q.device)
    for span, (before, padding) in zip(sequences.spans_q(), _rows(prefix, sequences.batch), strict=True):
        if span.length <= padding:
            continue
        own_q, own_k, own_v = (span.read(x)[None, :, padding:] for x in (q, k, v))
        got = _one_sequence(own_q, own_k, own_v, before, scale, window, dtype)
        span.read(out)[:, padding:] = got.out[0]
        row_lse = lse[:, span.first : span.first + span.length] if span.packed else lse[span.number]
        row_lse[:, padding:] = got.lse[0]
    return AttentionOutput(out, lse)


def _one_sequence(
    q: Tensor, k: Tensor, v: Tensor, prefix: CachedKV | None, scale: float, window: int | None, dtype: torch.dtype
) -> AttentionOutput:
    """``[1, heads, tokens, head_dim]`` without padding."""
    chunk = int8_attention(quantise_chunk(q, k, v, scale), causal=True, window=window, dtype=dtype)
    if prefix is None or not prefix.length:
        return chunk
    tokens = q.shape[2]
    # A query of `prefill_attention` is where it would be among the newest tokens of the cache: `tokens` before its
    # place here.
    back = None if window is None else window - tokens
    before = prefill_attention(q.to(dtype), prefix, scale=scale, causal=False, window=back)
    return merge_attention(AttentionOutput(before.out, before.lse.to(dtype)), chunk)


def _rows(prefix: CachedKV | PagedKV | None, batch: int) -> Iterator[tuple[CachedKV | None, int]]:
    """For each sequence its prefix, and how many tokens of its chunk are still left padding."""
    for i in range(batch):
        if prefix is None:
            yield None, 0
        elif isinstance(prefix, PagedKV):
            yield sequence(prefix, i), 0
        else:
            start = 0 if prefix.starts is None else int(prefix.starts[i])
            row = prefix.row(i) if start < prefix.length else None
            yield row, max(0, start - prefix.length)
