"""Paged sequences and the chunks behind them as K and V in 16 bits, for attention kernels that read no codes."""

from typing import Literal

import torch
from torch import Tensor

from turboattention.errors import invalid
from turboattention.ops.common.paged_kv import PagedKV, sequence
from turboattention.ops.dispatch import say_slower, without_portable, without_triton
from turboattention.ops.prefill.reference import expand_cache


def expand_with_chunk(
    prefix: PagedKV,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    *,
    total: int,
    longest: int,
    cu_k: Tensor | None = None,
    implementation: Literal["triton", "reference"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """K and V of each sequence, first what the cache stands for, then the exact tokens of its chunk.

    prefix: the cache before the chunks; its lengths may be 0. key, value: ``[tokens, kv_heads, head_dim]``, the chunks
    one after the other. cu_q: int32 ``[batch + 1]``, where each begins and ends.
    cu_k: int32 ``[batch + 1]``, where each sequence with its chunk begins and ends in the result; None: made here.
    total, longest: of the tokens of all sequences with their chunks, and of the longest; bounds that the host knows.
    implementation: ``triton`` or ``reference``; None takes the first that fits, on a GPU with a warning for the latter.

    Returns keys and values ``[total, kv_heads, head_dim]`` in the dtype of ``key`` and int32 ``cu_k`` ``[batch + 1]``;
    beyond its end they hold anything. Raises InvalidInputError for shapes that do not fit.
    """
    heads, dim = prefix.tail_key.shape[1], prefix.tail_key.shape[3]
    if key.shape[1:] != (heads, dim) or value.shape != key.shape or key.stride(2) != 1 or value.stride(2) != 1:
        expected = f"both [tokens, {heads}, {dim}], contiguous channels"
        raise invalid("key, value", expected, f"{tuple(key.shape)} and {tuple(value.shape)}")
    if cu_q.shape != (len(prefix.lengths) + 1,):
        raise invalid("cu_q", f"{len(prefix.lengths) + 1} numbers", tuple(cu_q.shape))
    if cu_k is None:
        cu_k = bounds(prefix.lengths + cu_q.diff())
    keys, values = (torch.empty(total, heads, dim, dtype=key.dtype, device=key.device) for _ in range(2))
    missing = without_triton(key.device) or next(
        filter(None, (without_portable(g.layout) for g in prefix.groups)), None
    )
    if implementation is None and missing and key.is_cuda:
        say_slower(missing)
    if implementation == "triton" or (implementation is None and not missing):
        from turboattention.ops.prefill.expand_triton import expand_into  # needs Triton

        expand_into(prefix, key, value, cu_q, cu_k, longest, keys, values)
    else:
        _expand_reference(prefix, key, value, cu_q.tolist(), cu_k.tolist(), keys, values)
    return keys, values, cu_k


def bounds(counts: Tensor) -> Tensor:
    """int32 ``[batch + 1]``, where each of ``counts`` tokens one after the other begins and ends."""
    found = counts.new_zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=found[1:])
    return found


def _expand_reference(
    prefix: PagedKV, key: Tensor, value: Tensor, firsts: list[int], places: list[int], keys: Tensor, values: Tensor
) -> None:  # fmt: skip
    """The definition, one sequence after the other."""
    for i in range(len(prefix.lengths)):
        chunk, place = slice(firsts[i], firsts[i + 1]), slice(places[i], places[i + 1])
        old = expand_cache(sequence(prefix, i), torch.float32)
        for out, before, own in zip((keys, values), old, (key, value), strict=True):
            out[place] = torch.cat([before[0].transpose(0, 1).to(key.dtype), own[chunk]])
