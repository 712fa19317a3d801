"""The two kinds of cache of a comparison, behind the same three questions: make, finish, count."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import DynamicCache

from turboattention.integrations.transformers import TurboCache, enable

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from turboattention.policy import Policy

BYTES_16_BIT = 2


def make_cache(model: "PreTrainedModel", policy: "str | Policy | None") -> "Cache":
    """An empty cache: ordinary for ``None``, TurboAttention's for a policy."""
    return DynamicCache(config=model.config) if policy is None else TurboCache(model.config, policy)


def attention_of(model: "PreTrainedModel", policy: "str | Policy | None") -> "AbstractContextManager[object]":
    """Inside it, ``model`` computes with the policy's attention; with its own for ``None``."""
    return nullcontext() if policy is None else enable(model, policy)


def finish(cache: "Cache") -> None:
    """Say that all tokens of ``cache`` are final, so that every full page is stored compressed."""
    if isinstance(cache, TurboCache):
        cache.commit()


def held_bytes(cache: "Cache") -> int:
    """Bytes that the cache holds; an ordinary one counts 2 bytes a value, also when it computes in float32."""
    return int(cache.nbytes) if isinstance(cache, TurboCache) else BYTES_16_BIT * held_values(cache)


def held_values(cache: "Cache") -> int:
    """Number of K and V elements stored."""
    if isinstance(cache, TurboCache):
        return int(cache.num_values)
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))
