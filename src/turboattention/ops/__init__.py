"""The operators, and the choice of an implementation for each.

Every operator has a ``reference.py`` in plain PyTorch; kernels are chosen here when one fits the device.
"""

import torch
from torch import Tensor

from turboattention.config import AttentionConfig
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.decode import decode_attention
from turboattention.ops.prefill import prefill_attention

__all__ = ["CachedKV", "attend", "decode_attention", "implementations", "prefill_attention"]

_PLAIN = AttentionConfig()


def attend(
    q: Tensor,
    kv: CachedKV,
    *,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    config: AttentionConfig = _PLAIN,
) -> Tensor:
    """Attention of the newest ``q.shape[2]`` tokens over the cache; arguments as `prefill_attention`.

    While nothing is compressed and the arithmetic is plain, torch's own attention computes it: same result, faster.
    """
    if not kv.page_tokens and softcap is None and config == _PLAIN:
        return _torch_attention(q, kv, scale, causal)
    if q.shape[2] == 1:
        return decode_attention(q, kv, scale=scale, softcap=softcap, config=config).out
    return prefill_attention(q, kv, scale=scale, causal=causal, softcap=softcap, config=config).out


def _torch_attention(q: Tensor, kv: CachedKV, scale: float | None, causal: bool) -> Tensor:
    queries = q.shape[2]
    whole = causal and kv.starts is None and queries == kv.length and queries > 1
    mask = None if whole else kv.visible(queries, causal)
    if mask is not None:
        # A padding row sees nothing; torch returns zeros or NaN for it depending on the backend, so it sees itself.
        blind = ~mask.any(-1, keepdim=True)
        mask = (mask | blind)[:, None]
    key, value = (x.to(q.dtype) for x in (kv.tail_key, kv.tail_value))
    return torch.nn.functional.scaled_dot_product_attention(
        q, key, value, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=q.shape[1] != kv.num_kv_heads
    )


def implementations() -> dict[str, str]:
    """The implementation that each operator uses on this machine."""
    return dict.fromkeys(("append", "decode", "prefill", "softmax"), "reference (PyTorch)")
