"""Pages as the C++ kernels want them described."""

from array import array
from collections.abc import Sequence

from torch import Tensor

from turboattention.cpu.structs import format_address
from turboattention.ops.common.cached_kv import HeadGroup
from turboattention.ops.common.paged_kv import PagedGroup

WORDS = 6  # of a `structs.HeadPages`


def describe_pages(groups: Sequence[HeadGroup | PagedGroup], kv_heads: int, alive: list[Tensor]) -> "array[int]":
    """A `structs.HeadPages` for each KV head; zeros for a head of no group.

    What is not contiguous is copied. The described tensors join ``alive``.
    """
    words = [0] * (WORDS * kv_heads)
    for group in groups:
        layout = format_address(group.layout)
        if isinstance(group, PagedGroup):
            pool, table = group.pool.contiguous(), group.table.contiguous()
            alive += (pool, table)
            data, count, batch, step = pool.data_ptr(), pool.shape[0], table.stride(0), 4 * table.stride(1)
            place = table.data_ptr()
            for head in group.heads:
                words[WORDS * head : WORDS * head + WORDS] = (layout, data, 0, place, batch, count)
                place += step
        else:
            pages = group.pages.contiguous()
            alive.append(pages)
            data, batch, step = pages.data_ptr(), pages.stride(0), pages.stride(1)
            for head in group.heads:
                words[WORDS * head : WORDS * head + WORDS] = (layout, data, batch, 0, 0, 0)
                data += step
    return array("q", words)
