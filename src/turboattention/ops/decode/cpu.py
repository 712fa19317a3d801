"""Attention over pages by the C++ kernels: from caches to the arguments of a call."""

from functools import lru_cache

import torch
from torch import Tensor

from turboattention.cpu import library, structs
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.common.cpu_pages import describe_pages
from turboattention.ops.common.paged_kv import PagedKV, with_own_rows
from turboattention.ops.prefill.reference import AttentionOutput


def attend(
    q: Tensor,
    kv: CachedKV | PagedKV,
    *,
    scale: float,
    causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    split: int | None = None,
    isa: int | None = None,
) -> AttentionOutput:
    """`prefill_attention` over pages that `dispatch.without_portable` accepts; the caller has checked the shapes.

    q: float16, bfloat16 or float32 ``[batch, heads, queries, head_dim]`` on the CPU. isa: an instruction set of
    `library.INSTRUCTION_SETS`, at most the processor's; None: the widest.
    Uses as many threads as ``torch.get_num_threads()`` says; the same call gives the same bits for the same number.
    split: tokens of pages that make a part (up to the next multiple of 256); then a sequence gives the same bits for
    any number of threads and any others in the batch.
    Returns out like q and lse float32 ``[batch, heads, queries]``.
    """
    batch, heads, queries, dim = q.shape
    if isinstance(kv, PagedKV):
        kv = with_own_rows(kv)
    alive: list[Tensor] = []  # until the call has returned
    query, tail_key, tail_value = (structs.view_of(x, alive) for x in (q, kv.tail_key, kv.tail_value))
    pages = describe_pages(kv.groups, kv.num_kv_heads, alive)
    starts: Tensor | None = None
    if isinstance(kv, PagedKV):
        lengths, page_tokens, capacity = kv.lengths, kv.page_tokens, kv.tail_key.shape[2]
    else:
        lengths, page_tokens, capacity = _equal(batch, kv.length), _equal(batch, kv.page_tokens), 0
        starts = None if kv.starts is None else kv.starts.contiguous()
    sinks, sink_key, sink_value = 0, structs.NO_TENSOR, structs.NO_TENSOR
    if kv.sink_key is not None and kv.sink_value is not None:
        sinks = kv.sink_key.shape[2]
        sink_key, sink_value = structs.view_of(kv.sink_key, alive), structs.view_of(kv.sink_value, alive)
    # Tokens outermost, as models want it: their transpose to [batch, queries, heads, head_dim] is then no copy.
    shape, dtype = (batch, queries, heads, dim), alive[0].dtype
    out = (
        torch.empty(shape, dtype=dtype).transpose(1, 2)
        if queries > 1
        else torch.empty(batch, heads, 1, dim, dtype=dtype)
    )
    lse = torch.empty(batch, heads, queries, dtype=torch.float32)
    arguments = structs.pack(
        structs.Attention,
        batch, heads, kv.num_kv_heads, queries, dim, int(causal), window or 0, sinks, capacity, split or 0,
        scale, softcap or 0.0, pages.buffer_info()[0], lengths.data_ptr(), page_tokens.data_ptr(),
        0 if starts is None else starts.data_ptr(),
        *query, *tail_key, *tail_value, *sink_key, *sink_value, *structs.view_of(out, alive),
        lse.data_ptr(), torch.get_num_threads(), library.loaded().isa if isa is None else isa,
    )  # fmt: skip
    library.call("ta_attend", arguments)
    return AttentionOutput(out, lse)


@lru_cache(maxsize=64)
def _equal(batch: int, number: int) -> Tensor:
    return torch.full((batch,), number, dtype=torch.int32)
