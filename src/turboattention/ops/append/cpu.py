"""Compression of whole pages by the C++ kernels: the bytes of `reference.compress_pages`."""

import ctypes

import torch
from torch import Tensor

from turboattention.cpu import library, structs
from turboattention.ops.append import reference
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
    key, value = structs.readable(key), structs.readable(value)
    mask = None if valid is None else valid.contiguous()
    power = None if query_power is None else query_power.float().expand(batch, heads, dim).contiguous()
    arguments = structs.Compress(
        batch, heads, pages, ctypes.pointer(structs.page_format(layout)), structs.view_of(key),
        structs.view_of(value), None if mask is None else mask.data_ptr(),
        0 if mask is None or mask.shape[0] == 1 else mask.stride(0), None if power is None else power.data_ptr(),
        heads * dim, dim, out.data_ptr(), torch.get_num_threads(), library.loaded().isa if isa is None else isa,
    )  # fmt: skip
    if library.call("ta_compress", arguments) == library.BEYOND_FLOAT16:
        # Raises with the name and the number of what does not fit.
        return reference.compress_pages(layout, key, value, valid, None, query_power)
    return out
