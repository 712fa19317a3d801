"""Attention over a contiguous cache by the implementation that fits the device."""

from torch import Tensor

from turboattention.config import AttentionConfig
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.dispatch import Implementation, choose, code_path, say_slower
from turboattention.ops.prefill.reference import AttentionOutput, check_queries, prefill_attention

_PLAIN = AttentionConfig()


def cached_attention(
    q: Tensor,
    kv: CachedKV,
    *,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    config: AttentionConfig = _PLAIN,
    implementation: Implementation | None = None,
) -> AttentionOutput:
    """`prefill_attention` (one query: decode) by a kernel where one fits, else by the definition; see `dispatch`.

    implementation: insist on one; UnsupportedError with the reason where it can't be had.
    """
    layouts = tuple(group.layout for group in kv.groups)
    chosen, reason = choose(layouts, q.device, q.dtype, queries=q.shape[2], config=config, wanted=implementation)
    if implementation is None and chosen != "reference":
        if q.requires_grad:
            chosen, reason = "reference", "the kernels have no gradient"
        elif window is not None and not causal:
            chosen, reason = "reference", "the kernels take a window of causal attention only"
    if chosen == "reference":
        if q.is_cuda and layouts and implementation is None:
            say_slower(reason)
        return prefill_attention(q, kv, scale=scale, causal=causal, softcap=softcap, window=window, config=config)
    from turboattention.ops.decode.launch import KernelView, Request, attend  # needs Triton

    check_queries(q, kv)
    request = Request(q.shape[-1] ** -0.5 if scale is None else scale, causal, softcap, window)
    view = KernelView.of_cached(kv)
    return AttentionOutput(*attend(q, view, request, gluon=chosen == "gluon", how=code_path(q.device)))
