"""The definition of decode: one query of each sequence over its pages and exact tail."""

from torch import Tensor

from turboattention.config import AttentionConfig
from turboattention.errors import invalid
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.prefill.reference import AttentionOutput, Form, prefill_attention


def decode_attention(
    q: Tensor,
    kv: CachedKV,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    config: AttentionConfig | None = None,
    form: Form = "folded",
) -> AttentionOutput:
    """Prefill with a chunk of one token, which sees every token of the cache; arguments as `prefill_attention`.

    q: ``[batch, heads, 1, head_dim]``.
    """
    if q.dim() != 4 or q.shape[2] != 1:
        raise invalid("q", "[batch, heads, 1, head_dim]", f"shape {tuple(q.shape)}")
    return prefill_attention(q, kv, scale=scale, causal=True, softcap=softcap, window=window, config=config, form=form)
