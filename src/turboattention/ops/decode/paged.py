"""Decode over a paged cache."""

from torch import Tensor

from turboattention.checks import check_heads
from turboattention.errors import invalid
from turboattention.ops.common.paged_kv import PagedKV
from turboattention.ops.dispatch import Implementation
from turboattention.ops.prefill.over_cache import over_cache
from turboattention.ops.prefill.reference import AttentionOutput


def paged_decode(
    q: Tensor,
    kv: PagedKV,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    implementation: Implementation | None = None,
    programs: int | None = None,
    split: int | None = None,
) -> AttentionOutput:
    """Attention of the newest token of each sequence over its pages, sinks and tail.

    q: float16, bfloat16 or float32 ``[batch, heads, 1, head_dim]``, heads a multiple of the KV heads. scale:
    ``head_dim ** -0.5`` when None. softcap: ``cap * tanh(score / cap)``. window: only that many last tokens, the newest
    included, are seen; pages before them are not read.
    implementation: None chooses (see `dispatch`); ``reference`` puts the pages and the tail of each sequence in order
    and computes the definition over them. The kernels read lengths on the device alone, so that a CUDA graph
    may be replayed with others (call it once before the capture: the first call copies the heads' numbers to the GPU).
    programs: how many share the pages, None: by the GPU's size. The result is the same bit for bit for the same
    lengths and the same number of programs (C++: of threads).
    split: so many pages make a program (C++: a part) instead, whatever the GPU, the threads and the batch; then each
    sequence gives the same result bit for bit whatever else is in the batch, for tables of the same width;
    ``reference`` does so always.
    Returns out like q and lse float32 ``[batch, heads, 1]``. Raises InvalidInputError for shapes that do not fit,
    UnsupportedError for an implementation that can't be had.
    """
    check_heads("q", q, head_dim=kv.tail_key.shape[-1])
    if q.shape[2] != 1 or q.shape[0] != kv.lengths.shape[0] or q.shape[1] % kv.num_kv_heads:
        expected = f"[{kv.lengths.shape[0]}, a multiple of {kv.num_kv_heads}, 1, {kv.tail_key.shape[-1]}]"
        raise invalid("q", expected, f"shape {tuple(q.shape)}")
    if window is not None and window < 1:
        raise invalid("window", "1 or more tokens", window)
    if split is not None and (split < 1 or programs is not None):
        raise invalid("split", "1 or more pages, and no programs", f"{split} with programs {programs}")
    if softcap is not None and not softcap > 0:
        raise invalid("softcap", "a positive number", softcap)
    return over_cache(
        q,
        kv,
        scale=scale,
        softcap=softcap,
        window=window,
        implementation=implementation,
        programs=programs,
        split=split,
    )
