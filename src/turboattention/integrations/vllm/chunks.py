"""Attention of chunks of prompts over themselves and over what the cache held before them."""

from itertools import pairwise

import torch
from torch import Tensor

from turboattention.config import AttentionConfig
from turboattention.integrations.vllm.metadata import TurboMetadata
from turboattention.ops import attend
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.common.paged_kv import PagedKV, sequence
from turboattention.ops.prefill import chunked_prefill
from turboattention.ops.prefill.over_cache import over_cache
from turboattention.ops.prefill.reference import AttentionOutput
from turboattention.ops.prefill.sequences import Sequences


def attend_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: PagedKV | None,
    meta: TurboMetadata,
    scale: float,
    config: AttentionConfig,
) -> Tensor:
    """Causal attention of packed chunks ``[tokens, heads, head_dim]``; returns the same shape.

    before: the cache before the chunks, None where no chunk has any. With chunk_bits 8 a chunk reads itself in INT8;
    else FlashAttention computes that part on GPUs, and on CPUs everything is one call for each sequence.
    """
    assert meta.cu is not None  # there are chunks
    if config.chunk_bits == 8:
        sequences = Sequences.packed(q, k, meta.cu, max_q=meta.longest)
        return chunked_prefill(q, k, v, before, scale=scale, sequences=sequences).out
    if q.device.type == "cpu":
        return _one_by_one(q, k, v, before, meta, scale)
    chunk = _flash(q, k, v, meta, scale)
    if before is None:
        return chunk.out
    from turboattention.ops.prefill.merge_triton import merge_into  # needs Triton

    sequences = Sequences.packed(q, k, meta.cu, max_q=meta.longest)
    rows = meta.cu[:-1, None] + torch.arange(meta.longest, device=q.device)
    dense = q[rows.clamp_max(len(q) - 1)].transpose(1, 2)
    merge_into(chunk, over_cache(dense, before, scale=scale, causal=False), sequences)
    return chunk.out


def _flash(q: Tensor, k: Tensor, v: Tensor, meta: TurboMetadata, scale: float) -> AttentionOutput:
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(head_size=q.shape[-1])
    out, lse = fa_utils.flash_attn_varlen_func(
        q=q, k=k, v=v, cu_seqlens_q=meta.cu, cu_seqlens_k=meta.cu, max_seqlen_q=meta.longest,
        max_seqlen_k=meta.longest, softmax_scale=scale, causal=True, return_softmax_lse=True, fa_version=version,
    )[:2]  # fmt: skip
    return AttentionOutput(out, lse)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, before: PagedKV | None, meta: TurboMetadata, scale: float
) -> Tensor:  # fmt: skip
    """As transformers' path computes a chunk: its own tokens stand in the exact tail."""
    out = torch.empty_like(q)
    starts = [start - meta.first_token for start in meta.chunk_starts]
    for i, (first, last) in enumerate(pairwise(starts)):
        if last == first:
            continue
        x, key, value = (part[first:last].transpose(0, 1)[None] for part in (q, k, v))
        view = CachedKV((), 0, key, value)
        if before is not None:
            old = sequence(before, i)
            key, value = (torch.cat([a.to(b.dtype), b], 2) for a, b in ((old.tail_key, key), (old.tail_value, value)))
            view = CachedKV(old.groups, old.page_tokens, key, value, old.sink_key, old.sink_value)
        out[first:last] = attend(x, view, scale=scale)[0].transpose(0, 1)
    return out
