"""Attention of a chunk of queries over full pages and its own tokens."""

from turboattention.ops.prefill.cached import cached_attention
from turboattention.ops.prefill.chunked import chunked_prefill
from turboattention.ops.prefill.reference import AttentionOutput, prefill_attention

__all__ = ["AttentionOutput", "cached_attention", "chunked_prefill", "prefill_attention"]
