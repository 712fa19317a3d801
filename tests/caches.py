"""Caches of random tokens that tests of attention share."""

from dataclasses import replace

import torch
from torch import Tensor

from turboattention.kvcache import LayerCache
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.policy import Override, Policy


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def policy_of(preset: str, sinks: int = 1, window: int = 0, overrides: tuple[Override, ...] = ()) -> Policy:
    policy = Policy.resolve(preset)
    return replace(policy, cache=replace(policy.cache, sink_tokens=sinks, recent_window=window), overrides=overrides)


def filled(
    policy: Policy, length: int, *, head_dim: int = 64, kv_heads: int = 2, batch: int = 1,
    starts: tuple[int, ...] | None = None, seed: int = 0, mean: float = 0.0, dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> CachedKV:  # fmt: skip
    """A compressed cache of random tokens; one channel of K is eight times as large and has a mean."""
    cache = LayerCache(policy.cache, policy.head_formats(0, kv_heads))
    key, value, q = (normal(batch, kv_heads, length, head_dim, seed=3 * seed + i).to(device) for i in range(3))
    key[..., 3] = 8.0 * key[..., 3] + mean
    cache.append(key.to(dtype), value.to(dtype))
    cache.set_padding(None if starts is None else torch.tensor(starts, device=device))
    cache.observe(q)
    cache.commit()
    return cache.view()
