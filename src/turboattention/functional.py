"""Attention as one function call, without a cache object to keep."""

import torch
from torch import Tensor

from turboattention.checks import check_heads
from turboattention.config import DEFAULT_PRESET
from turboattention.errors import invalid
from turboattention.kvcache import LayerCache
from turboattention.ops import attend
from turboattention.policy import ModelShape, Policy

# Queries of one step: a page, so that each token reads what a decode step at its position would read.
_STEP = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    config: str | Policy = "default",
) -> Tensor:
    """Attention as ``torch.nn.functional.scaled_dot_product_attention`` computes it, over quantised K and V.

    q: ``[batch, heads, queries, head_dim]``; k, v: ``[batch, kv_heads, tokens, head_dim]`` (float16, bfloat16 or
    float32; heads a multiple of kv_heads; with ``causal`` the queries are the last tokens). scale: ``head_dim ** -0.5``
    when None.
    config: a preset's name, ``default`` (turbo4), or a Policy.
    Causal: token t reads the pages before it quantised and its own page exactly, as in a decode step (in INT8 with a
    Policy whose attention has ``chunk_bits`` 8). Not causal: all full pages are quantised.
    Raises InvalidInputError for shapes that do not fit, NaN or Inf. Returns ``q``'s shape and dtype.
    """
    check_heads("q", q)
    check_heads("k", k, head_dim=q.shape[-1])
    check_heads("v", v)
    if v.shape != k.shape:
        raise invalid("v", f"the shape of k {tuple(k.shape)}", tuple(v.shape))
    if q.shape[0] != k.shape[0]:
        raise invalid("q", f"batch {k.shape[0]} as k", q.shape[0])
    if not q.shape[2] or not k.shape[2]:
        raise invalid("k" if q.shape[2] else "q", "at least 1 token", 0)
    if causal and q.shape[2] > k.shape[2]:
        raise invalid("q", f"at most {k.shape[2]} queries (the tokens of k)", q.shape[2])
    if q.shape[1] % k.shape[1]:
        raise invalid("q", f"a multiple of {k.shape[1]} KV heads", f"{q.shape[1]} heads")
    policy = Policy.resolve(DEFAULT_PRESET if config == "default" else config)
    policy.validate_for(ModelShape("", 1, k.shape[1], k.shape[3]))
    cache = LayerCache(policy.cache, policy.head_formats(0, k.shape[1]))
    if not causal:
        cache.append(k, v)
        cache.observe(q)
        cache.commit()
        view = cache.view()
        outs = [
            attend(q[:, :, i : i + view.length], view, scale=scale, causal=False, config=policy.attention)
            for i in range(0, q.shape[2], view.length)
        ]
        return torch.cat(outs, 2)
    outs, done = [], k.shape[2] - q.shape[2]
    if done:
        cache.append(k[:, :, :done], v[:, :, :done])
    while done < k.shape[2]:
        # Steps end at page borders.
        last = min(k.shape[2], (done // _STEP + 1) * _STEP)
        cache.append(k[:, :, done:last], v[:, :, done:last])
        first = done - (k.shape[2] - q.shape[2])
        part = q[:, :, first : first + last - done]
        cache.observe(part)
        outs.append(attend(part, cache.view(), scale=scale, config=policy.attention))
        done = last
    return torch.cat(outs, 2)
