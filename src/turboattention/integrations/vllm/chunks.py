"""Attention of chunks of prompts over themselves and over what the cache held before them."""

from itertools import pairwise

import torch
from torch import Tensor

from turboattention.config import AttentionConfig
from turboattention.integrations.vllm.metadata import TurboMetadata
from turboattention.ops import attend
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.common.paged_kv import PagedKV, sequence, sequences_of
from turboattention.ops.prefill import chunked_prefill
from turboattention.ops.prefill.expand import expand_with_chunk
from turboattention.ops.prefill.int8_prefill import int8_prefill
from turboattention.ops.prefill.sequences import Sequences


def attend_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: PagedKV | None,
    meta: TurboMetadata,
    scale: float,
    config: AttentionConfig,
    out: Tensor,
) -> None:
    """Causal attention of packed chunks ``[tokens, heads, head_dim]``, written into ``out`` of the same shape.

    before: the cache before the chunks, None where no chunk has any. On CPUs each sequence is one call over its codes.
    On GPUs what the codes stand for is written out in 16 bits with the chunk behind it (decision 0007), in parts
    (`parts`), and FlashAttention reads that; with chunk_bits 8 `int8_prefill`.
    """
    assert meta.cu is not None  # there are chunks
    assert meta.packed is not None  # always beside it
    if q.device.type == "cpu":
        if config.chunk_bits == 8:
            sequences = Sequences.packed(q, k, meta.cu, max_q=meta.packed.longest)
            out.copy_(chunked_prefill(q, k, v, before, scale=scale, sequences=sequences).out)
            return
        _one_by_one(q, k, v, before, meta, scale, out)
        return
    attention = _int8 if config.chunk_bits == 8 else _flash
    if before is None:
        attention(q, k, v, meta.cu, meta.cu, meta.packed.longest, meta.packed.longest, scale, out)
        return
    for part in meta.parts:
        keys, values, cu_k = expand_with_chunk(
            sequences_of(before, part.first, part.last), k[part.tokens], v[part.tokens], part.cu_q,
            total=part.total, longest=part.longest, cu_k=part.cu_k,
        )  # fmt: skip
        attention(
            q[part.tokens], keys, values, part.cu_q, cu_k, meta.packed.longest, part.longest, scale, out[part.tokens]
        )  # fmt: skip


def _int8(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, scale: float,
    out: Tensor,
) -> None:  # fmt: skip
    sequences = Sequences.packed(q, k, cu_q, cu_k, max_q=longest_q, max_k=longest_k)
    out.copy_(int8_prefill(q, k, v, scale=scale, sequences=sequences).out)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, scale: float,
    out: Tensor,
) -> None:  # fmt: skip
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(head_size=q.shape[-1])
    fa_utils.flash_attn_varlen_func(
        q=q, k=k, v=v, out=out, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k,
        softmax_scale=scale, causal=True, fa_version=version,
    )  # fmt: skip


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, before: PagedKV | None, meta: TurboMetadata, scale: float,
    out: Tensor,
) -> None:  # fmt: skip
    """As transformers' path computes a chunk: its own tokens stand in the exact tail."""
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
