"""FlashAttention-3 of vLLM's wheel (0.33): 16 bits, and FP8 with its conversion included."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from turboattention.errors import UnsupportedError

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of FP8


def _attention() -> Callable[..., Tensor]:
    if find_spec("vllm") is None:
        raise UnsupportedError("vllm is not installed")
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    found: Callable[..., Tensor] = flash_attn_varlen_func
    return found


def _packed(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """Tokens outermost, as the kernel reads them, and its other arguments."""
    batch, _, tokens, _ = q.shape
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens
    options = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": tokens, "max_seqlen_k": tokens}
    return [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v)], {
        **options, "causal": causal, "fa_version": 3,
    }  # fmt: skip


def _unpacked(out: Tensor, like: Tensor) -> Tensor:
    return out.unflatten(0, (like.shape[0], -1)).transpose(1, 2)


def prepare(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    """As `turboattention.bench.baselines.PrefillBaseline`, in 16 bits."""
    attention = _attention()
    inputs, options = _packed(q, k, v, causal)
    return lambda: _unpacked(attention(*inputs, **options), q)


def prepare_fp8(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    """The same in FP8, one scale for each sequence and KV head."""
    attention = _attention()
    inputs, options = _packed(q, k, v, causal)
    batch, kv_heads = k.shape[:2]

    def convert(x: Tensor) -> tuple[Tensor, Tensor]:
        grouped = x.unflatten(1, (kv_heads, -1)).unflatten(0, (batch, -1))
        scale = (grouped.abs().amax((1, 3, 4)) / LARGEST).float().clamp_min(1e-12)
        return (grouped / scale[:, None, :, None, None]).to(FP8).view(x.shape), scale

    def call() -> Tensor:
        (a, q_scale), (b, k_scale), (c, v_scale) = (convert(x) for x in inputs)
        out = attention(a, b, c, **options, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
        return _unpacked(out, q)

    return call
