"""Attention over pages by the C++ kernels: from caches to the arguments of a call."""

import ctypes
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from turboattention.cpu import library, structs
from turboattention.ops.common.cached_kv import CachedKV, HeadGroup
from turboattention.ops.common.cpu_pages import describe_pool
from turboattention.ops.common.paged_kv import PagedGroup, PagedKV
from turboattention.ops.prefill.reference import AttentionOutput


def attend(
    q: Tensor,
    kv: CachedKV | PagedKV,
    *,
    scale: float,
    causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    isa: int | None = None,
) -> AttentionOutput:
    """`prefill_attention` over pages that `dispatch.without_portable` accepts; the caller has checked the shapes.

    q: float16, bfloat16 or float32 ``[batch, heads, queries, head_dim]`` on the CPU. isa: an instruction set of
    `library.INSTRUCTION_SETS`, at most the processor's; None: the widest.
    Uses as many threads as ``torch.get_num_threads()`` says; the same call gives the same bits for the same number.
    Returns out like q and lse float32 ``[batch, heads, queries]``.
    """
    batch, heads, queries, dim = q.shape
    q = structs.readable(q)
    tails = structs.readable(kv.tail_key), structs.readable(kv.tail_value)
    # Contiguous copies of what must be, alive until the call has returned.
    alive: list[Tensor] = [q, *tails]
    pages = (structs.HeadPages * kv.num_kv_heads)()
    for group in kv.groups:
        _describe(group, pages, alive)
    starts: Tensor | None = None
    if isinstance(kv, PagedKV):
        lengths, page_tokens, capacity = kv.lengths, kv.page_tokens, kv.tail_key.shape[2]
    else:
        lengths, page_tokens, capacity = _equal(batch, kv.length), _equal(batch, kv.page_tokens), 0
        starts = None if kv.starts is None else kv.starts.contiguous()
    sinks = 0
    sink_views = [structs.NO_TENSOR, structs.NO_TENSOR]
    if kv.sink_key is not None and kv.sink_value is not None:
        sinks = kv.sink_key.shape[2]
        exact = structs.readable(kv.sink_key), structs.readable(kv.sink_value)
        alive += exact
        sink_views = [structs.view_of(x) for x in exact]
    # Tokens outermost, as models want it: their transpose to [batch, queries, heads, head_dim] is then no copy.
    out = torch.empty(batch, queries, heads, dim, dtype=q.dtype).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32)
    arguments = structs.Attention(
        batch, heads, kv.num_kv_heads, queries, dim, int(causal), window or 0, sinks, capacity, scale, softcap or 0.0,
        pages, lengths.data_ptr(), page_tokens.data_ptr(), None if starts is None else starts.data_ptr(),
        structs.view_of(q), structs.view_of(tails[0]), structs.view_of(tails[1]), *sink_views, structs.view_of(out),
        lse.data_ptr(), torch.get_num_threads(), library.loaded().isa if isa is None else isa,
    )  # fmt: skip
    library.call("ta_attend", arguments)
    return AttentionOutput(out, lse)


def _describe(group: HeadGroup | PagedGroup, pages: "ctypes.Array[structs.HeadPages]", alive: list[Tensor]) -> None:
    """Fill in the pages of a group's heads."""
    if isinstance(group, PagedGroup):
        group = replace(group, pool=group.pool.contiguous(), table=group.table.contiguous())
        alive += [group.pool, group.table]
        describe_pool(group, pages)
        return
    layout = ctypes.pointer(structs.page_format(group.layout))
    held = group.pages.contiguous()
    alive.append(held)
    first, step = held.data_ptr(), held.stride(1)
    for i, head in enumerate(group.heads):
        pages[head] = structs.HeadPages(layout, first + i * step, held.stride(0), None, 0, 0)


@lru_cache(maxsize=64)
def _equal(batch: int, number: int) -> Tensor:
    return torch.full((batch,), number, dtype=torch.int32)
