"""The formats that calibration chooses from, for K and for V of a head, and the policies and bytes they make."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from turboattention.config import CacheConfig, TensorFormat, get_preset
from turboattention.policy import ModelShape, Override, Policy
from turboattention.quant.layout import PageLayout

Tensor2 = Literal["key", "value"]
TENSORS: tuple[Tensor2, Tensor2] = ("key", "value")
EXACT = "16"

# Everything but the widths is that of the turbo presets (docs/decisions/0001): only what a page can mix varies.
BASE: CacheConfig = get_preset("turbo4").cache


def _key(bits: int, share: float = 0.0, more: int = 0) -> TensorFormat:
    return replace(BASE.key, bits=bits, search=bits <= 3, refined_share=share, refined_bits=more)


def _value(bits: int) -> TensorFormat:
    return replace(BASE.value, bits=bits)


# "2+2x1/4": 2 bits, and two more for a quarter of the channels of each page.
LEVELS: Mapping[Tensor2, Mapping[str, TensorFormat]] = {
    "key": {
        "2": _key(2),
        "2+2x1/8": _key(2, 1 / 8, 2),
        "2+2x1/4": _key(2, 1 / 4, 2),
        "2+2x1/2": _key(2, 1 / 2, 2),
        "3": _key(3),
        "3+1x1/4": _key(3, 1 / 4, 1),
        "3+1x1/2": _key(3, 1 / 2, 1),
        "4": _key(4),
        "4+1x1/4": _key(4, 1 / 4, 1),
        "4+1x1/2": _key(4, 1 / 2, 1),
        "8": _key(8),
    },
    "value": {str(bits): _value(bits) for bits in (2, 3, 4, 8)},
}
PLAIN_LEVELS = ("2", "3", "4", "8")  # the ones that both tensors have


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
        (k, v): PageLayout(BASE.page_size, head_dim, LEVELS["key"][k], LEVELS["value"][v]).nbytes
        for k, v in product(LEVELS["key"], LEVELS["value"])
    }


def override(tensor: Tensor2, level: str, layer: int | None = None, head: int | None = None) -> Override:
    """The override that gives ``tensor`` the format of ``level`` on top of `BASE`."""
    fmt = LEVELS[tensor][level]
    if tensor == "value":
        return Override(fmt.bits, layer, head, tensor)
    return Override(fmt.bits, layer, head, tensor, fmt.search, fmt.refined_share, fmt.refined_bits)


def policy_of(name: str, choice: Choice, shape: ModelShape) -> Policy:
    """The policy with these levels; heads that agree share an override."""
    overrides: list[Override] = []
    for layer in range(shape.layers):
        for side, tensor in enumerate(TENSORS):
            levels = [choice[layer, head][side] for head in range(shape.kv_heads)]
            common = max(sorted(set(levels)), key=levels.count)
            overrides.append(override(tensor, common, layer))
            overrides += [override(tensor, x, layer, head) for head, x in enumerate(levels) if x != common]
    return Policy(name, BASE, overrides=tuple(overrides), model=shape)


def alone(unit: Unit, level: str, shape: ModelShape) -> Policy:
    """Everything in 16 bits but one unit: what a measured sensitivity is measured with."""
    overrides = (Override(16), override(unit.tensor, level, unit.layer, unit.head))
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
