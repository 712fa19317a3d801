"""Caches of random tokens that tests of attention share."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from turboattention.kvcache import LayerCache
from turboattention.kvcache.paged import PagedCache
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.policy import Override, Policy


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., ::17, ::9] *= 1e4
    return x


# Numbers at the edge, made of random tokens [..., tokens, head_dim].
EDGES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "all-equal": lambda x: torch.full_like(x, -3.0),
    "outliers": outliers,
    "outlier-channel": lambda x: torch.cat([torch.full_like(x[..., :1], 1e4), x[..., 1:]], -1),
    "float32-subnormal": lambda x: x * 1e-40,
}


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


def paged(
    policy: Policy, prefixes: tuple[int, ...], *, head_dim: int = 64, kv_heads: int = 2,
    device: torch.device | None = None,
) -> PagedCache:  # fmt: skip
    """Sequences with prefixes of several lengths; whatever is not theirs is NaN, garbage or out of range."""
    device = device or torch.device("cpu")
    rows, longest = len(prefixes), max(prefixes)
    cache = PagedCache(
        policy.cache, policy.head_formats(0, kv_heads), rows=rows, max_tokens=longest + 64, head_dim=head_dim,
        shuffle=3, device=device,
    )  # fmt: skip
    key, value, q = (normal(rows, heads, longest, head_dim, seed=i).to(device, torch.float16) for i, heads in
                     ((1, kv_heads), (2, kv_heads), (3, 2 * kv_heads)))  # fmt: skip
    counts = torch.tensor(prefixes, dtype=torch.int32, device=device)
    cache.observe(q, counts)
    cache.append(key, value, when="after", counts=counts)
    cache.check()
    capacity = cache.tail_key.shape[2]
    pages = [n // policy.cache.page_size for n in cache.page_tokens.tolist()]
    for row, length in enumerate(prefixes):
        kept = torch.arange(pages[row] * policy.cache.page_size, length, device=device) % capacity
        free = torch.ones(capacity, dtype=torch.bool, device=device).index_fill(0, kept, False)
        cache.tail_key[row, :, free] = torch.nan
        cache.tail_value[row, :, free] = torch.nan
    for group in cache.groups:
        used = [group.table[row, :, :count].flatten() for row, count in enumerate(pages)]
        for row, count in enumerate(pages):
            group.table[row, :, count:] = 2**30
        unused = torch.ones(len(group.pool), dtype=torch.bool, device=device)
        group.pool[unused.index_fill(0, torch.cat(used).long(), False)] = 255
    return cache
