"""New K and V enter the cache: when a page is full it is compressed once, never again."""

from collections.abc import Callable

import torch

from turboattention.errors import UnsupportedError
from turboattention.ops.append.page_spec import supports
from turboattention.ops.append.paged import When, advance, tail_capacity
from turboattention.ops.append.reference import add_query_power, compress_pages, full_pages, gather_sinks, real_tokens
from turboattention.quant.layout import PageLayout

__all__ = [
    "When",
    "add_query_power",
    "advance",
    "compress_pages",
    "full_pages",
    "gather_sinks",
    "paged_append_for",
    "real_tokens",
    "supports",
    "tail_capacity",
]


def paged_append_for(layouts: list[PageLayout], device: torch.device) -> Callable[..., None]:
    """The implementation of `paged.append_paged` for a device: the Triton kernel on GPUs, PyTorch on CPUs.

    Raises UnsupportedError for layouts that the kernel refuses: the definition reads lengths on the host, which would
    make every step on a GPU wait.
    """
    if device.type == "cpu":
        from turboattention.ops.append.paged import append_paged as definition

        return definition
    for layout in layouts:
        if reason := supports(layout):
            raise UnsupportedError(f"paged append on {device.type}: {reason}; use a turbo preset or int8")
    from turboattention.ops.append.triton_paged import append_paged as kernel

    return kernel
