"""Append by the C++ kernels: the bytes of `reference.compress_pages` and `paged.append_paged`."""

from array import array

import torch
from torch import Tensor

from turboattention.cpu import library, structs
from turboattention.errors import invalid
from turboattention.ops.append import paged, reference
from turboattention.ops.append.packed import Packed
from turboattention.ops.append.page_spec import supports
from turboattention.ops.common.cpu_pages import describe_pages
from turboattention.ops.common.paged_kv import PagedKV, appending_to_own_rows, sequences_of
from turboattention.quant.layout import PageLayout


def compress_pages(
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    query_power: Tensor | None = None,
    *,
    isa: int | None = None,
) -> Tensor:
    """`reference.compress_pages` for layouts that `page_spec.supports` accepts, on the CPU; arguments as there.

    key, value: float16, bfloat16 or float32. isa: see `ops.decode.cpu.attend`.
    """
    batch, heads, tokens, dim = key.shape
    pages = tokens // layout.page_size
    out = torch.empty(batch, heads, pages, layout.nbytes, dtype=torch.uint8)
    alive: list[Tensor] = []  # until the call has returned
    views = (*structs.view_of(key, alive), *structs.view_of(value, alive))
    mask = None if valid is None else valid.contiguous()
    power = None if query_power is None else query_power.float().expand(batch, heads, dim).contiguous()
    arguments = structs.pack(
        structs.Compress, batch, heads, pages, structs.format_address(layout), *views,
        0 if mask is None else mask.data_ptr(),
        0 if mask is None or mask.shape[0] == 1 else mask.stride(0), 0 if power is None else power.data_ptr(),
        heads * dim, dim, out.data_ptr(), torch.get_num_threads(), library.loaded().isa if isa is None else isa,
    )  # fmt: skip
    if library.call("ta_compress", arguments) == library.BEYOND_FLOAT16:
        # Raises with the name and the number of what does not fit.
        return reference.compress_pages(layout, key, value, valid, None, query_power)
    return out


def append_paged(
    kv: PagedKV,
    key: Tensor,
    value: Tensor,
    *,
    when: paged.When,
    fault: Tensor,
    window: int = 0,
    counts: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    query_power: Tensor | None = None,
    queries: Tensor | None = None,
    packed: Packed | None = None,
    isa: int | None = None,
) -> None:
    """`paged.append_paged` on the CPU: contract and arguments as there; isa: see `ops.decode.cpu.attend`.

    Formats that the kernels do not write, and float64 tails, go to the definition. Raises InvalidInputError also for
    pools and tables that are not contiguous, and tails and sinks whose channels are not.
    """
    stored = kv.tail_key.dtype
    if stored not in structs.DTYPES or any(supports(group.layout) for group in kv.groups):
        paged.append_paged(
            kv, key, value, when=when, fault=fault, window=window, counts=counts, rope=rope, query_power=query_power,
            queries=queries, packed=packed,
        )  # fmt: skip
        return
    paged.check_step(
        kv, key, value, when=when, fault=fault, window=window, counts=counts, rope=rope, query_power=query_power,
        queries=queries, packed=packed,
    )  # fmt: skip
    _check_memory(kv)
    if packed is not None:
        assert counts is not None  # check_step has looked
        for row, (start, count) in enumerate(zip(packed.starts.tolist(), counts.tolist(), strict=True)):
            # Also without new tokens: a page that is full by now is written. The kernel wants a token to look past.
            part = slice(start, start + min(count, packed.longest)) if count else slice(0, 1)
            power = query_power if query_power is None or kv.tail_rows is not None else query_power[row : row + 1]
            append_paged(
                sequences_of(kv, row, row + 1), key[:, :, part], value[:, :, part], when=when,
                fault=fault[row : row + 1], window=window, counts=counts[row : row + 1], query_power=power, isa=isa,
            )  # fmt: skip
        return
    if queries is not None and query_power is not None:
        paged.add_step_queries(query_power, queries, kv.tail_rows, counts)
    if kv.tail_rows is not None or kv.sink_rows is not None:
        # The kernel knows one row for each sequence; the copies are small beside the rest on a CPU.
        with appending_to_own_rows(kv, query_power) as (own, power):
            append_paged(
                own, key, value, when=when, fault=fault, window=window, counts=counts, rope=rope, query_power=power,
                isa=isa,
            )  # fmt: skip
        return
    key = key if rope is None else paged.rotate_positions(key, *rope)
    key, value = (x if x.dtype == stored else x.to(stored) for x in (key, value))
    batch, heads, tokens, _ = key.shape
    alive: list[Tensor] = []  # until the call has returned
    new = (*structs.view_of(key, alive), *structs.view_of(value, alive))
    tails = (*structs.view_of(kv.tail_key, alive), *structs.view_of(kv.tail_value, alive))
    sinks, sink_key, sink_value = 0, structs.NO_TENSOR, structs.NO_TENSOR
    if kv.sink_key is not None and kv.sink_value is not None:
        sinks = kv.sink_key.shape[2]
        sink_key, sink_value = structs.view_of(kv.sink_key, alive), structs.view_of(kv.sink_value, alive)
    pages = describe_pages(kv.groups, heads, alive)
    group_of = array("i", [0] * heads)
    for number, group in enumerate(kv.groups):
        for head in group.heads:
            group_of[head] = number
    arguments = structs.pack(
        structs.Append,
        batch, heads, tokens, sinks, kv.tail_key.shape[2], window, int(when == "before"), pages.buffer_info()[0],
        group_of.buffer_info()[0], kv.lengths.data_ptr(), kv.page_tokens.data_ptr(),
        0 if counts is None else counts.data_ptr(), kv.groups[0].table.shape[-1], *new, *tails, *sink_key, *sink_value,
        0 if query_power is None else query_power.data_ptr(), fault.data_ptr(), torch.get_num_threads(),
        library.loaded().isa if isa is None else isa,
    )  # fmt: skip
    library.call("ta_append", arguments)


def _check_memory(kv: PagedKV) -> None:
    """Raise unless the kernel can write in place: what it would fill of a copy, nobody would see."""
    for group in kv.groups:
        for name, x in (("pool", group.pool), ("table", group.table)):
            if not x.is_contiguous():
                raise invalid(name, f"contiguous {list(x.shape)}", f"strides {x.stride()}")
    for name, part in (
        ("tail_key", kv.tail_key), ("tail_value", kv.tail_value), ("sink_key", kv.sink_key),
        ("sink_value", kv.sink_value),
    ):  # fmt: skip
        if part is not None and part.stride(-1) != 1:
            raise invalid(name, "contiguous channels", f"strides {part.stride()}")
