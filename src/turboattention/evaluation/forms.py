"""Each form of pages is kernels of its own on a GPU: those of a comparison are compiled side by side, not in turn."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch

from turboattention.integrations.transformers import model_shape
from turboattention.kvcache import LayerCache
from turboattention.kvcache.contiguous import HeadFormat
from turboattention.ops import attend
from turboattention.policy import ModelShape, Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_forms(model: "PreTrainedModel", policies: "Sequence[str | Policy]", rows: int, chunk: int) -> int:
    """Use each form of page of caches of ``policies``, for ``rows`` sequences that grow by ``chunk`` tokens.

    A shorter chunk at the end may need one small kernel more. Returns how many forms of pages there are.
    """
    forms = distinct_forms(map(Policy.resolve, policies), model_shape(model.config))
    use = partial(use_form, model=model, rows=rows, chunk=chunk)
    # Most of the compiler runs without Python's lock. Forms that are known by now take milliseconds.
    with ThreadPoolExecutor(max(1, min(len(forms), os.cpu_count() or 1))) as threads:
        list(threads.map(use, forms))
    return len(forms)


def distinct_forms(policies: Iterable[Policy], shape: ModelShape) -> list[tuple[Policy, HeadFormat]]:
    """The formats of K and V, below 16 bits, that any head has, each with a policy that has it."""
    found: dict[object, tuple[Policy, HeadFormat]] = {}
    for policy in policies:
        for layer in range(shape.layers):
            for pair in policy.head_formats(layer, shape.kv_heads):
                if any(fmt.bits < 16 for fmt in pair):
                    found.setdefault((policy.cache, policy.attention, pair), (policy, pair))
    return list(found.values())


@torch.inference_mode()
def use_form(form: tuple[Policy, HeadFormat], model: "PreTrainedModel", rows: int, chunk: int) -> LayerCache:
    """A layer of that form from empty until pages with and without the first tokens have been written and read."""
    policy, pair = form
    text = model.config.get_text_config(decoder=True)
    shape = model_shape(model.config)
    cache = LayerCache(policy.cache, [pair] * shape.kv_heads)
    q, k = (
        torch.ones(rows, heads, chunk, shape.head_dim, dtype=model.dtype, device=model.device)
        for heads in (text.num_attention_heads, shape.kv_heads)
    )
    softcap = getattr(text, "attn_logit_softcapping", None)
    seen = 0  # pages that attention has read
    while seen < 2:
        cache.append(k, k)
        cache.observe(q)
        attend(q, cache.view(), softcap=softcap, config=policy.attention)
        seen = cache.page_count
        cache.settle()
    return cache
