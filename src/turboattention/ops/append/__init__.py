"""New K and V enter the cache: when a page is full it is compressed once, never again."""

from collections.abc import Callable

import torch
from torch import Tensor

from turboattention.cpu.structs import DTYPES
from turboattention.errors import UnsupportedError
from turboattention.ops.append import cpu, reference
from turboattention.ops.append.page_spec import supports
from turboattention.ops.append.paged import When, advance, tail_capacity
from turboattention.ops.append.reference import add_query_power, full_pages, gather_sinks, real_tokens
from turboattention.ops.dispatch import without_cpu, without_triton
from turboattention.quant.layout import PageLayout

__all__ = [
    "When",
    "add_query_power",
    "advance",
    "append_implementation",
    "compress_pages",
    "full_pages",
    "gather_sinks",
    "paged_append_for",
    "real_tokens",
    "supports",
    "tail_capacity",
]


def compress_pages(
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    tile_scales: tuple[Tensor, Tensor] | None = None,
    query_power: Tensor | None = None,
) -> Tensor:
    """`reference.compress_pages`, by the kernel that fits the device, where one does: the same bytes."""
    if tile_scales is None and without_cpu(key.device) is None and key.dtype in DTYPES and supports(layout) is None:
        return cpu.compress_pages(layout, key, value, valid, query_power)
    if tile_scales is None and without_triton(key.device) is None and supports(layout) is None:
        from turboattention.ops.append.triton import compress_pages as kernel  # needs Triton

        return kernel(layout, key, value, valid, query_power)
    return reference.compress_pages(layout, key, value, valid, tile_scales, query_power)


def append_implementation(layouts: list[PageLayout], device: torch.device) -> str:
    """Which of ``cpu``, ``triton`` and ``reference`` `paged_append_for` returns."""
    if device.type != "cpu":
        return "triton"
    return "reference" if without_cpu(device) or any(map(supports, layouts)) else "cpu"


def paged_append_for(layouts: list[PageLayout], device: torch.device) -> Callable[..., None]:
    """The implementation of `paged.append_paged` for a device: the Triton kernel on GPUs; on CPUs C++, else PyTorch.

    Raises UnsupportedError for layouts that the kernel refuses: the definition reads lengths on the host, which would
    make every step on a GPU wait.
    """
    chosen = append_implementation(layouts, device)
    if chosen == "cpu":
        return cpu.append_paged
    if chosen == "reference":
        from turboattention.ops.append.paged import append_paged as definition

        return definition
    for layout in layouts:
        if reason := supports(layout):
            raise UnsupportedError(f"paged append on {device.type}: {reason}; use a turbo preset or int8")
    from turboattention.ops.append.triton_paged import append_paged as kernel

    return kernel
