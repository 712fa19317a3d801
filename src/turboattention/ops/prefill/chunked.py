"""Chunked prefill: new tokens attend to a compressed prefix and, in INT8, to themselves; the parts merge by their LSE.

The prefix is read as the cache holds it (codes, exact tail, sinks): no page is copied or dequantised. README.md.
"""

from typing import Literal

import torch
from torch import Tensor

from turboattention.errors import UnsupportedError, invalid
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.common.paged_kv import PagedKV
from turboattention.ops.dispatch import Implementation, say_slower, without_cpu, without_triton
from turboattention.ops.prefill.chunked_reference import chunked_attention
from turboattention.ops.prefill.int8 import check_window
from turboattention.ops.prefill.int8_prefill import check_scale, check_softcap, int8_prefill
from turboattention.ops.prefill.over_cache import over_cache
from turboattention.ops.prefill.reference import AttentionOutput, merge_attention
from turboattention.ops.prefill.sequences import Sequences

Kernels = Literal["triton", "cpu"] | None  # None: those that fit


def chunked_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: CachedKV | PagedKV | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sequences: Sequences | None = None,
    implementation: Implementation | None = None,
) -> AttentionOutput:
    """Causal attention of a chunk of new tokens over the cache before it and over itself.

    Over the prefix as `over_cache` computes it, over the chunk's own K and V as `int8_prefill` does (both products in
    INT8, K smoothed); `chunked_reference` is the definition.

    q: float16, bfloat16 or float32 ``[batch, heads, tokens, head_dim]``; k, v: the same tokens with KV heads (query
    head h reads KV head h // ratio), exact, K after RoPE. Packed ``[tokens, heads, head_dim]`` of several lengths with
    ``sequences=Sequences.packed(q, k, cu)``; then the prefix is paged or None.
    prefix: the cache before these tokens, which it does not hold: contiguous (its ``starts`` may say that the chunk too
    begins with left padding), paged (lengths on the device, 0 for a sequence without prefix), or None.
    scale: factor of the scores, ``head_dim ** -0.5`` when None. window: a query sees at most that many last tokens,
    itself included.
    implementation: ``reference``, ``triton`` (any GPU; the interpreter on CPU tensors) or ``cpu`` (C++) for both parts.
    None chooses for each: kernels, and where one does not fit, PyTorch; on a GPU a warning says why.

    Returns out like q and lse float32 ``[batch, heads, tokens]`` (packed: ``[heads, tokens]``), natural logarithm.
    Padding gives zeros and -inf.
    Raises InvalidInputError for what does not fit; UnsupportedError for softcap, for a gradient, and for an
    implementation that can't be had.
    """
    check_softcap(softcap)
    sequences = sequences or Sequences.dense(q, k)
    sequences.check(q, k, v)
    _check_prefix(q, k, prefix, sequences)
    check_window(window, causal=True)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_scale(scale)
    if implementation not in (None, "reference", "triton", "cpu"):
        known = "'reference', 'triton', 'cpu' or None for a chunk in INT8"
        raise invalid("implementation", known, repr(implementation))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise UnsupportedError(
            "chunk_bits 8: rounding to INT8 has no gradient; call under torch.inference_mode() or use chunk_bits 16"
        )
    if implementation is None:
        missing = without_cpu(q.device) if q.device.type == "cpu" else without_triton(q.device)
        if q.is_cuda and missing:
            say_slower(missing)
        implementation = "reference" if missing else None
    if implementation == "reference":
        exact = chunked_attention(q, k, v, prefix, scale=scale, window=window, sequences=sequences)
        return AttentionOutput(exact.out.to(q.dtype), exact.lse)

    kernels: Kernels = implementation if implementation in ("triton", "cpu") else None
    starts = prefix.starts if isinstance(prefix, CachedKV) else None
    if starts is None:
        chunk = int8_prefill(q, k, v, scale=scale, sequences=sequences, window=window, implementation=kernels)
    else:
        assert isinstance(prefix, CachedKV)
        padding = (starts - prefix.length).clamp(0, q.shape[2])
        chunk = _left_padded(q, k, v, padding, scale, window, kernels)
    # Later queries see nothing of the prefix through the window.
    rows = sequences.max_q if window is None else min(sequences.max_q, window - 1)
    if prefix is None or not rows or (isinstance(prefix, CachedKV) and not prefix.length):
        return chunk
    if not prefix.groups and kernels is None and q.is_cuda:
        say_slower("nothing before the chunk is compressed")
    x = _dense(q, sequences)[:, :, :rows] if sequences.is_packed else q[:, :, :rows]
    # `over_cache` has these queries among the newest tokens of the prefix, `rows` before their place.
    back = None if window is None else window - rows
    before = over_cache(x, prefix, scale=scale, causal=False, window=back, implementation=kernels)
    if q.device.type == "cpu" and kernels != "triton":
        _merge_in_turn(chunk, before, sequences)
        return chunk
    from turboattention.ops.prefill.merge_triton import merge_into  # needs Triton

    merge_into(chunk, before, sequences)
    return chunk


def _left_padded(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor, scale: float, window: int | None, kernels: Kernels
) -> AttentionOutput:  # fmt: skip
    """`int8_prefill` of a dense batch whose rows begin with ``padding`` (int64 ``[batch]``, on the device) tokens.

    Packed, each row is two sequences, its padding and its tokens: lengths stay on the device, and the padding is no
    part of the mean and the scales of the others.
    """
    batch, _, tokens, _ = q.shape
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    firsts = torch.arange(batch + 1, device=q.device) * tokens
    edges = torch.stack([firsts[:-1], firsts[:-1] + padding], 1).flatten()
    cu = torch.cat([edges, firsts[-1:]]).to(torch.int32)
    sequences = Sequences.packed(packed[0], packed[1], cu, max_q=tokens)
    got = int8_prefill(*packed, scale=scale, sequences=sequences, window=window, implementation=kernels)
    hidden = (torch.arange(tokens, device=q.device) < padding[:, None])[:, None]
    out = got.out.unflatten(0, (batch, tokens)).transpose(1, 2).masked_fill(hidden[..., None], 0.0)
    return AttentionOutput(out, got.lse.unflatten(1, (batch, tokens)).transpose(0, 1).masked_fill(hidden, -torch.inf))


def _merge_in_turn(chunk: AttentionOutput, before: AttentionOutput, sequences: Sequences) -> None:
    """`merge_triton.merge_into` in PyTorch, one sequence after the other."""
    for span in sequences.spans_q():
        rows = min(span.length, before.out.shape[2])
        out = span.read(chunk.out)[:, :rows]
        lse = (chunk.lse[:, span.first : span.first + rows] if span.packed else chunk.lse[span.number])[:, :rows]
        earlier = AttentionOutput(before.out[span.number, :, :rows], before.lse[span.number, :, :rows])
        merged = merge_attention(earlier, AttentionOutput(out, lse))
        out.copy_(merged.out)
        lse.copy_(merged.lse)


def _dense(q: Tensor, sequences: Sequences) -> Tensor:
    """Packed queries as ``[batch, heads, max_q, head_dim]``; behind the end of a sequence stands anything."""
    assert sequences.cu_q is not None
    rows = sequences.cu_q[:-1, None] + torch.arange(sequences.max_q, device=q.device)
    return q[rows.clamp_max(len(q) - 1)].transpose(1, 2)


def _check_prefix(q: Tensor, k: Tensor, prefix: CachedKV | PagedKV | None, sequences: Sequences) -> None:
    """Raise unless the chunk is self-contained and the prefix has its batch, KV heads and head_dim."""
    if k.shape[0 if sequences.is_packed else 2] != q.shape[0 if sequences.is_packed else 2]:
        raise invalid("k", "the same tokens as q", f"shape {tuple(k.shape)} for q {tuple(q.shape)}")
    if prefix is None:
        return
    if sequences.is_packed and isinstance(prefix, CachedKV):
        raise invalid("prefix", "a PagedKV with packed sequences", "CachedKV")
    batch, heads, _, dim = prefix.tail_key.shape
    if (batch, heads, dim) != (sequences.batch, k.shape[1], k.shape[-1]):
        expected = f"batch {sequences.batch}, {k.shape[1]} KV heads and head_dim {k.shape[-1]} as the chunk"
        raise invalid("prefix", expected, f"{batch}, {heads} and {dim}")
