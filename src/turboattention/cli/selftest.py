"""The self-test of `doctor`: small random tensors through every operator, against torch's own attention."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from turboattention.functional import attention
from turboattention.kvcache import LayerCache
from turboattention.ops import CachedKV, cached_attention, prefill_attention
from turboattention.policy import Policy
from turboattention.quant.error import max_error, relative_rms

HEADS, KV_HEADS, HEAD_DIM, QUERIES = 4, 2, 64, 64


@dataclass(frozen=True)
class Check:
    """One measured error and the most that a sound installation gives."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return math.isfinite(self.error) and self.error <= self.limit


def self_test() -> list[Check]:
    """Measure; the limits are far above the errors of a sound installation and far below those of a broken one."""
    generator = torch.Generator().manual_seed(0)
    tokens = 5 * QUERIES
    q = torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator)
    k = torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=generator)
    v = torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=generator)
    exact = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    plain = attention(q, k, v, config="fp16")
    return [
        Check("fp16 against torch, largest error", max_error(plain, exact), 1e-3),
        *(
            Check(f"{preset}: folded against expanded form, largest error", _folded_error(preset, q, k, v), 1e-4)
            for preset in ("turbo4", "turbo2")
        ),
        *(
            Check(
                f"{preset}: chosen implementation against the definition, relative RMS",
                _kernel_error(preset, q, k, v),
                1e-3,
            )
            for preset in ("turbo4", "turbo2")
        ),
        *(
            Check(f"{name} against torch, relative RMS", relative_rms(attention(q, k, v, config=name), exact), limit)
            for name, limit in (("int8", 0.02), ("turbo4", 0.15), ("turbo3", 0.3), ("turbo2", 0.6))
        ),
    ]


def _compressed(preset: str, k: torch.Tensor, v: torch.Tensor) -> CachedKV:
    policy = Policy.from_preset(preset)
    cache = LayerCache(policy.cache, policy.head_formats(0, KV_HEADS))
    cache.append(k, v)
    cache.commit()
    return cache.view()


def _folded_error(preset: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    kv = _compressed(preset, k, v)
    folded, expanded = (prefill_attention(q, kv, form=form).out for form in ("folded", "expanded"))
    return max_error(folded, expanded)


def _kernel_error(preset: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    kv = _compressed(preset, k, v)
    return relative_rms(cached_attention(q, kv).out, prefill_attention(q, kv).out)
