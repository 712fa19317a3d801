"""Attention over a cache of either kind, as it is stored, by the implementation that fits the device."""

from dataclasses import replace

import torch
from torch import Tensor

from turboattention.config import AttentionConfig
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.common.paged_kv import PagedKV, sequence
from turboattention.ops.dispatch import PLAIN, Implementation, choose, code_path, say_slower
from turboattention.ops.prefill.reference import AttentionOutput, prefill_attention


def over_cache(
    q: Tensor,
    kv: CachedKV | PagedKV,
    *,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    config: AttentionConfig = PLAIN,
    implementation: Implementation | None = None,
    programs: int | None = None,
    split: int | None = None,
    out: Tensor | None = None,
) -> AttentionOutput:
    """`prefill_attention` by a kernel where one fits, else by the definition; the caller has checked the shapes.

    q: ``[batch, heads, queries, head_dim]``; an empty sequence of a paged ``kv`` gives zeros and an lse of -inf. The
    other arguments as `prefill_attention` and `cached_attention`; programs, split: see `paged_decode`. out: like q, any
    strides but that of the channels, written and returned instead of a new tensor.
    """
    layouts = tuple(group.layout for group in kv.groups)
    chosen, reason = choose(layouts, q.device, q.dtype, queries=q.shape[2], config=config, wanted=implementation)
    differentiable = any(x.requires_grad for x in (q, kv.tail_key, kv.tail_value))
    if implementation is None and chosen != "reference" and differentiable:
        chosen, reason = "reference", "the kernels have no gradient"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "reference":
        if q.is_cuda and layouts and implementation is None:
            say_slower(reason)
        rows = [(q, kv)] if isinstance(kv, CachedKV) else [(q[i : i + 1], sequence(kv, i)) for i in range(len(q))]
        found = _joined(
            [
                # An empty sequence, with which engines fill a batch, has no newest token: it just sees nothing.
                prefill_attention(
                    x,
                    row,
                    scale=scale,
                    causal=causal and bool(row.length),
                    softcap=softcap,
                    window=window,
                    config=config,
                )
                for x, row in rows
            ],
            0,
        )
        return _into(out, found)
    if chosen == "cpu":
        from turboattention.ops.decode import cpu  # here, because its package imports this module

        tokens = None if split is None else split * layouts[0].page_size
        return _into(out, cpu.attend(q, kv, scale=scale, causal=causal, softcap=softcap, window=window, split=tokens))
    from turboattention.ops.decode.launch import QUERY_BLOCK, KernelView, Request, attend  # needs Triton

    view = KernelView.of_cached(kv) if isinstance(kv, CachedKV) else KernelView.of_paged(kv)
    request = Request(scale, causal, softcap, window)
    how = code_path(q.device)
    if window is None or causal:
        return AttentionOutput(
            *attend(q, view, request, gluon=chosen == "gluon", how=how, blocks=programs, split=split, out=out)
        )
    parts, left = [], q.shape[2]
    # Without causal all queries of a launch read the whole cache, and its window counts back from the last of them.
    for part in q.split(QUERY_BLOCK, 2):
        left -= part.shape[2]
        of_part = replace(request, window=window + left)
        pair = attend(part, view, of_part, gluon=chosen == "gluon", how=how, blocks=programs, split=split)
        parts.append(AttentionOutput(*pair))
    return _into(out, _joined(parts, 2))


def _into(out: Tensor | None, found: AttentionOutput) -> AttentionOutput:
    return found if out is None else AttentionOutput(out.copy_(found.out), found.lse)


def _joined(parts: list[AttentionOutput], dim: int) -> AttentionOutput:
    if len(parts) == 1:
        return parts[0]
    return AttentionOutput(torch.cat([part.out for part in parts], dim), torch.cat([part.lse for part in parts], dim))
