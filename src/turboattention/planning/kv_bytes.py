"""Bytes of the key/value cache of one sequence, for every way to store it; pages ask `PageLayout`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from turboattention.config import CacheConfig, presets, with_bits
from turboattention.integrations.vllm.pool import OpenPages
from turboattention.integrations.vllm.settings import DTYPES, PAGE_TOKENS, page_layout, policy_of_dtype
from turboattention.ops.append import full_pages
from turboattention.planning.model import ModelFacts
from turboattention.policy import Policy
from turboattention.quant.layout import PageLayout

Kind = Literal["plain", "pages", "library"]
BLOCK_TOKENS = 16  # of vLLM's own 16-bit and FP8 caches


@dataclass(frozen=True)
class Form:
    """A way to store the cache.

    kind: ``plain`` (vLLM's own, ``bits`` 16 or 8), ``pages`` (this package in vLLM, as ``policy``), ``library`` (this
        package in transformers).
    """

    name: str
    kind: Kind
    bits: int = 16
    policy: Policy | None = None

    @property
    def serves(self) -> bool:
        """Whether an engine serves it."""
        return self.kind != "library"


BF16, FP8 = Form("bf16", "plain", 16), Form("fp8", "plain", 8)


def all_forms() -> tuple[Form, ...]:
    """vLLM's 16-bit and FP8 cache, the KV dtypes of the plugin, and every preset in transformers."""
    pages = [Form(dtype, "pages", policy=policy_of_dtype(dtype)) for dtype in DTYPES]
    library = [Form(name, "library", policy=Policy.from_preset(preset)) for name, preset in presets().items()]
    return (BF16, FP8, *pages, *library)


def sequence_bytes(form: Form, model: ModelFacts, tokens: int) -> int:
    """Everything that a sequence of ``tokens`` tokens holds: codes, metadata, sinks, open pages, sliding windows."""
    return sum(
        count * (_layer(form, model, tokens) if window is None else _sliding(form, model, tokens, window))
        for window, count in model.kinds.items()
    )


def token_bytes(form: Form, model: ModelFacts) -> float:
    """What one more token costs in a long sequence."""
    page = 128  # a multiple of every page and block
    return (sequence_bytes(form, model, 1025 * page + 1) - sequence_bytes(form, model, 1024 * page + 1)) / page


def bits_per_value(form: Form, model: ModelFacts, tokens: int) -> float:
    """Bits per value of the layers that see everything, at ``tokens`` tokens."""
    return 8 * _layer(form, model, tokens) / (2 * model.kv_heads * model.head_dim * tokens)


def read_bytes(form: Form, model: ModelFacts, tokens: int, window: int | None) -> float:
    """What a step over one sequence reads in one layer."""
    seen = tokens if window is None else min(tokens, window)
    exact = _exact(model, 16)
    if window is not None or form.policy is None:
        return seen * exact * (8 if form.bits == 8 else 16) / 16
    cache = form.policy.cache
    layout = PageLayout(cache.page_size, model.head_dim, cache.key, cache.value)  # the sinks of a page are not read
    pages, rest = divmod(seen, cache.page_size)
    return pages * model.kv_heads * layout.nbytes + rest * exact


def _exact(model: ModelFacts, bits: int) -> int:
    """K and V of a token in one layer."""
    return 2 * model.kv_heads * model.head_dim * bits // 8


def _sliding(form: Form, model: ModelFacts, tokens: int, window: int) -> int:
    """These layers stay at 16 bits (8 in an FP8 cache) and are bounded."""
    return _blocks(min(tokens, window)) * _exact(model, form.bits if form.kind == "plain" else 16)


def _blocks(tokens: int) -> int:
    return math.ceil(tokens / BLOCK_TOKENS) * BLOCK_TOKENS


def _layer(form: Form, model: ModelFacts, tokens: int) -> int:
    """One layer that sees everything."""
    if form.policy is None:
        return _blocks(tokens) * _exact(model, form.bits)
    if form.kind == "library":
        return library_bytes(form.policy.cache, model.kv_heads, model.head_dim, tokens)
    layout = page_layout(form.policy.cache, model.head_dim)
    pages = math.ceil(tokens / PAGE_TOKENS)
    return pages * model.kv_heads * layout.nbytes + _open_row(layout, model.kv_heads)


@lru_cache(maxsize=64)
def _open_row(layout: PageLayout, kv_heads: int) -> int:
    """The exact newest tokens of a sequence, and what its queries said."""
    return OpenPages.allocate(layout, 1, kv_heads, torch.bfloat16, torch.device("meta")).nbytes


def library_bytes(cache: CacheConfig, kv_heads: int, head_dim: int, tokens: int) -> int:
    """What `kvcache.contiguous.LayerCache` holds of one sequence while it generates, 16-bit model."""
    exact_token = 2 * head_dim * 2
    if cache.key.bits == cache.value.bits == 16:
        return tokens * kv_heads * exact_token
    pages = full_pages(tokens, cache.page_size, max(cache.recent_window, 1))
    rest = tokens - pages * cache.page_size
    total = sum(pages * layout.nbytes for layout in _layouts(cache, kv_heads, head_dim))
    if cache.open_page == "int8_clamped":
        # The newest token is exact until the next step; K and V of a head have a float16 scale each.
        total += kv_heads * ((rest - 1) * 2 * head_dim + exact_token + 4)
    else:
        total += kv_heads * rest * exact_token
    total += kv_heads * cache.sink_tokens * exact_token if pages else 0
    return total + (kv_heads * head_dim * 4 if cache.key.refined_bits else 0)  # float32 sums of squared queries


def _layouts(cache: CacheConfig, kv_heads: int, head_dim: int) -> Sequence[PageLayout]:
    """Of each KV head; the paper's rule lowers some, whichever they will be."""
    low = int(cache.low_priority_heads * kv_heads)
    formats = [(cache.key, cache.value)] * (kv_heads - low)
    formats += [(with_bits(cache.key, cache.low_bits), with_bits(cache.value, cache.low_bits))] * low
    return [PageLayout(cache.page_size, head_dim, key, value) for key, value in formats]
