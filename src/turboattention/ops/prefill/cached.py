"""Attention over a contiguous cache by the implementation that fits the device and the configuration."""

from torch import Tensor

from turboattention.config import AttentionConfig
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.dispatch import PLAIN, Implementation
from turboattention.ops.prefill.chunked import chunked_prefill
from turboattention.ops.prefill.over_cache import over_cache
from turboattention.ops.prefill.reference import AttentionOutput, check_queries


def cached_attention(
    q: Tensor,
    kv: CachedKV,
    *,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    config: AttentionConfig = PLAIN,
    implementation: Implementation | None = None,
) -> AttentionOutput:
    """`prefill_attention` (one query: decode) by a kernel where one fits, else by the definition; see `dispatch`.

    With ``config.chunk_bits`` 8 and at least 64 queries (causal): `chunked_prefill`, the queries' own tokens in INT8.
    implementation: insist on one; UnsupportedError with the reason where it can't be had.
    """
    check_queries(q, kv, causal)
    if causal and config.rounds_chunk(q.shape[2]):
        prefix, k, v = kv.split(q.shape[2])
        return chunked_prefill(
            q, k, v, prefix, scale=scale, softcap=softcap, window=window, implementation=implementation
        )
    return over_cache(
        q, kv, scale=scale, causal=causal, softcap=softcap, window=window, config=config, implementation=implementation
    )
