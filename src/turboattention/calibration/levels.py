"""The formats that calibration chooses from, for K and for V of a head, and the policies and bytes they make."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal

from turboattention.config import CacheConfig, TensorFormat, get_preset
from turboattention.policy import ModelShape, Override, Policy
from turboattention.quant.layout import PageLayout

Tensor2 = Literal["key", "value"]
TENSORS: tuple[Tensor2, Tensor2] = ("key", "value")

# Everything but the widths is that of the turbo presets (docs/decisions/0001): only what a page can mix varies.
BASE: CacheConfig = get_preset("turbo4").cache
PLAIN_LEVELS = ("2", "3", "4", "8")  # the ones that both tensors have
# More bits for some channels of K, as (bits more, what the page may grow by in bits per value). A page is a multiple of
# 128 bytes, so that the first ones are free.
_REFINED = ((1, 0.0), (1, 1 / 8), (2, 1 / 8), (2, 2 / 8), (2, 3 / 8))


@lru_cache(maxsize=8)
def levels(tensor: Tensor2, head_dim: int) -> Mapping[str, TensorFormat]:
    """The levels of K or V by name: bits, and for K ``2+2x18``: two more bits for 18 channels of each page."""
    if tensor == "value":
        return {level: replace(BASE.value, bits=int(level)) for level in PLAIN_LEVELS}
    found: dict[str, TensorFormat] = {}
    for level in PLAIN_LEVELS:
        bits = int(level)
        plain = replace(BASE.key, bits=bits, search=bits <= 3, refined_share=0.0, refined_bits=0)
        found[level] = plain
        room = PageLayout(BASE.page_size, head_dim, plain, BASE.value)
        for more, growth in _REFINED if bits < 8 else ():
            most = room.nbytes + growth * room.num_values / 8
            for channels in range(head_dim // 2, 0, -1):
                fmt = replace(plain, refined_share=channels / head_dim, refined_bits=more)
                if PageLayout(BASE.page_size, head_dim, fmt, BASE.value).nbytes <= most:
                    found[f"{bits}+{more}x{fmt.refined_channels(head_dim)}"] = fmt
                    break
    return found


@dataclass(frozen=True, order=True)
class Unit:
    """What gets a format of its own: K or V of one KV head of a layer."""

    layer: int
    head: int
    tensor: Tensor2

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}.{self.tensor}"


Choice = Mapping[tuple[int, int], tuple[str, str]]  # (layer, KV head) -> levels of K and of V


def page_bytes(head_dim: int) -> dict[tuple[str, str], int]:
    """Bytes of a page of one head for each pair of levels of K and V, as the cache stores it."""
    return {
        (key, value): PageLayout(BASE.page_size, head_dim, key_format, value_format).nbytes
        for (key, key_format), (value, value_format) in product(*(levels(x, head_dim).items() for x in TENSORS))
    }


def override(tensor: Tensor2, level: str, head_dim: int, layer: int, head: int | None = None) -> Override:
    """The override that gives ``tensor`` the format of ``level`` on top of `BASE`."""
    fmt = levels(tensor, head_dim)[level]
    if tensor == "value":
        return Override(fmt.bits, layer, head, tensor)
    return Override(fmt.bits, layer, head, tensor, fmt.search, fmt.refined_share, fmt.refined_bits)


def policy_of(name: str, choice: Choice, shape: ModelShape) -> Policy:
    """The policy with these levels; heads that agree share an override."""
    overrides: list[Override] = []
    for layer in range(shape.layers):
        for side, tensor in enumerate(TENSORS):
            wanted = [choice[layer, head][side] for head in range(shape.kv_heads)]
            common = max(sorted(set(wanted)), key=wanted.count)
            overrides.append(override(tensor, common, shape.head_dim, layer))
            overrides += [
                override(tensor, level, shape.head_dim, layer, head)
                for head, level in enumerate(wanted)
                if level != common
            ]
    return Policy(name, BASE, overrides=tuple(overrides), model=shape)


def alone(unit: Unit, level: str, shape: ModelShape) -> Policy:
    """Everything in 16 bits but one unit: what a measured sensitivity is measured with."""
    overrides = (Override(16), override(unit.tensor, level, shape.head_dim, unit.layer, unit.head))
    return Policy(f"{unit}@{level}", BASE, overrides=overrides, model=shape)


def uniform(key: str, value: str, shape: ModelShape) -> Choice:
    """The same levels everywhere."""
    return {(layer, head): (key, value) for layer in range(shape.layers) for head in range(shape.kv_heads)}


def cache_bits(policy: Policy, shape: ModelShape, tokens: int) -> float:
    """Bits per value of a cache of ``tokens`` tokens after `commit`, every byte counted, as `TurboCache` counts them.

    For policies that fix every head (no ``low_priority_heads``), stored from float16 or bfloat16.
    """
    cache = policy.cache
    pages = max(0, tokens - cache.recent_window) // cache.page_size
    total = 0
    for layer in range(shape.layers):
        formats = policy.head_formats(layer, shape.kv_heads)
        if all(fmt.bits == 16 for pair in formats for fmt in pair):
            total += shape.kv_heads * tokens * shape.head_dim * 4
            continue
        total += sum(pages * PageLayout(cache.page_size, shape.head_dim, *pair).nbytes for pair in formats)
        exact = tokens - pages * cache.page_size + (cache.sink_tokens if pages else 0)
        total += shape.kv_heads * exact * shape.head_dim * 4
        if any(key.refined_bits for key, _ in formats):
            total += shape.kv_heads * shape.head_dim * 4  # the float32 sums of squared queries
    return 8 * total / (2 * shape.layers * shape.kv_heads * shape.head_dim * tokens)
