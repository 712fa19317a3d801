"""Pools of pages as the C++ kernels want them described."""

import ctypes

from turboattention.cpu import structs
from turboattention.ops.common.paged_kv import PagedGroup


def describe_pool(group: PagedGroup, pages: "ctypes.Array[structs.HeadPages]") -> None:
    """Fill in the entries of the group's KV heads; pool and table are contiguous and outlive the call of a kernel."""
    layout, table = ctypes.pointer(structs.page_format(group.layout)), group.table
    first, step = table.data_ptr(), table.stride(1) * table.element_size()
    for i, head in enumerate(group.heads):
        pages[head] = structs.HeadPages(
            layout, group.pool.data_ptr(), 0, first + i * step, table.stride(0), group.pool.shape[0]
        )
