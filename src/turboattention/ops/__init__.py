"""The operators, and the choice of an implementation for each.

Every operator has a ``reference.py`` in plain PyTorch; kernels are chosen here when one fits the device.
"""

import torch
from torch import Tensor

from turboattention.config import DEFAULT_PRESET, AttentionConfig, get_preset
from turboattention.cpu.library import instruction_set
from turboattention.ops.append import supports as append_supports
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.decode import decode_attention, paged_decode
from turboattention.ops.dispatch import PLAIN, choose, without_cpu, without_triton
from turboattention.ops.prefill import cached_attention, chunked_prefill, prefill_attention
from turboattention.ops.prefill.int8_prefill import choose_for
from turboattention.quant.layout import PageLayout

__all__ = [
    "CachedKV",
    "attend",
    "cached_attention",
    "chunked_prefill",
    "decode_attention",
    "implementations",
    "paged_decode",
    "prefill_attention",
]


def attend(
    q: Tensor,
    kv: CachedKV,
    *,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    config: AttentionConfig = PLAIN,
) -> Tensor:
    """Attention of the newest ``q.shape[2]`` tokens over the cache; arguments as `cached_attention`.

    While nothing is compressed and the arithmetic is plain, torch's own attention computes it: same result, faster.
    """
    in_int8 = causal and config.rounds_chunk(q.shape[2])
    if not kv.page_tokens and softcap is None and config.plain and not in_int8:
        return _torch_attention(q, kv, scale, causal)
    return cached_attention(q, kv, scale=scale, causal=causal, softcap=softcap, config=config).out


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


def implementations(
    preset: str = DEFAULT_PRESET, head_dim: int = 128, device: torch.device | None = None
) -> dict[str, tuple[str, str]]:
    """The implementation that each operator uses here for a preset, and why: ``{operator: (name, reason)}``.

    device: the CUDA device where there is one, else the CPU.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = get_preset(preset).cache
    layout = PageLayout(cache.page_size, head_dim, cache.key, cache.value)
    config = get_preset(preset).attention
    missing = without_triton(device)
    on_cpu = device.type == "cpu"
    no_append = (without_cpu(device) if on_cpu else missing) or append_supports(layout)
    kernel = ("cpu", f"C++ kernels, {instruction_set()}") if on_cpu else ("triton", "the kernel made for this device")
    append = ("reference", no_append) if no_append else kernel
    decode, prefill = (choose((layout,), device, torch.float16, queries=n, config=config) for n in (1, 64))
    no_chunk = without_cpu(device) if on_cpu else missing
    chunk: str = "reference" if no_chunk else choose_for(device, head_dim)
    int8_prefill = (chunk, no_chunk or "of a chunk over itself, with a policy of chunk_bits 8")
    softmax = ("reference", "the kernels compute the exact softmax")
    return {
        "append": append,
        "decode": (decode.implementation, decode.reason),
        "prefill": (prefill.implementation, prefill.reason),
        "int8_prefill": int8_prefill,
        "softmax": softmax,
    }
