"""The structs of ``kernels/abi.h``, field by field."""

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from turboattention.quant.layout import PageLayout

ABI_VERSION = 2
ABSENT = -1
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_REGIONS = (
    "key_codes", "key_page_scale", "key_scale", "key_page_zero", "key_zero", "key_refined_index", "key_refined_codes",
    "value_codes", "value_page_scale", "value_scale", "value_page_zero", "value_zero",
)  # fmt: skip
_SIZES = (
    "page_size", "head_dim", "nbytes", "key_bits", "key_search", "refined", "refined_bits", "value_bits",
    "value_search", "rotation",
)  # fmt: skip


class PageFormat(ctypes.Structure):
    """Sizes and byte offsets of a page."""

    _fields_ = [(name, c_int32) for name in (*_SIZES, *_REGIONS)]  # as ctypes wants it


class HeadPages(ctypes.Structure):
    """The pages of one KV head."""

    _fields_ = [
        ("format", POINTER(PageFormat)),
        ("pages", c_void_p),
        ("batch_bytes", c_int64),
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("pool_pages", c_int64),
    ]


class TensorView(ctypes.Structure):
    """A tensor ``[batch, heads, tokens, head_dim]`` with contiguous channels."""

    _fields_ = [
        ("data", c_void_p),
        ("batch", c_int64),
        ("head", c_int64),
        ("token", c_int64),
        ("dtype", c_int32),
    ]


class Attention(ctypes.Structure):
    """A call of attention over pages and exact tokens."""

    _fields_ = [
        *((name, c_int32) for name in ("batch", "heads", "kv_heads", "queries", "head_dim")),
        *((name, c_int32) for name in ("causal", "window", "sinks", "capacity")),
        ("scale", c_float),
        ("softcap", c_float),
        ("pages", POINTER(HeadPages)),
        ("lengths", c_void_p),
        ("page_tokens", c_void_p),
        ("starts", c_void_p),
        *((name, TensorView) for name in ("q", "tail_key", "tail_value", "sink_key", "sink_value", "out")),
        ("lse", c_void_p),
        ("threads", c_int32),
        ("isa", c_int32),
    ]


class Compress(ctypes.Structure):
    """A compression of whole pages."""

    _fields_ = [
        ("batch", c_int32),
        ("heads", c_int32),
        ("pages", c_int32),
        ("format", POINTER(PageFormat)),
        ("key", TensorView),
        ("value", TensorView),
        ("valid", c_void_p),
        ("valid_stride", c_int64),
        ("power", c_void_p),
        ("power_batch", c_int64),
        ("power_head", c_int64),
        ("out", c_void_p),
        ("threads", c_int32),
        ("isa", c_int32),
    ]


class Append(ctypes.Structure):
    """A step of a paged cache."""

    _fields_ = [
        *((name, c_int32) for name in ("batch", "heads", "tokens", "sinks", "capacity", "window", "before")),
        ("pages", POINTER(HeadPages)),
        ("group_of", POINTER(c_int32)),
        ("lengths", c_void_p),
        ("page_tokens", c_void_p),
        ("counts", c_void_p),
        ("table_pages", c_int64),
        *((name, TensorView) for name in ("key", "value", "tail_key", "tail_value", "sink_key", "sink_value")),
        ("power", c_void_p),
        ("fault", c_void_p),
        ("threads", c_int32),
        ("isa", c_int32),
    ]


class Prefill(ctypes.Structure):
    """INT8 prefill of a chunk."""

    _fields_ = [
        *((name, c_int32) for name in ("batch", "heads", "kv_heads", "head_dim")),
        *((name, c_int32) for name in ("tokens_q", "tokens_k", "causal", "window")),
        ("scale", c_float),
        ("cu_q", c_void_p),
        ("cu_k", c_void_p),
        *((name, TensorView) for name in ("q", "key", "value", "out")),
        ("lse", c_void_p),
        ("lse_batch", c_int64),
        ("lse_head", c_int64),
        ("threads", c_int32),
        ("isa", c_int32),
    ]


@lru_cache(maxsize=256)
def page_format(layout: PageLayout) -> PageFormat:
    """The numbers of ``layout``, two-level with K per channel and V per token."""
    key, value = layout.key, layout.value
    refined = key.refined_channels(layout.head_dim)
    sizes = (
        layout.page_size, layout.head_dim, layout.nbytes, key.bits, int(key.search), refined,
        key.refined_bits if refined else 0, value.bits, int(value.search),
        layout.head_dim & -layout.head_dim if value.rotated else 1,
    )  # fmt: skip
    offsets = [layout.regions[name].offset if name in layout.regions else ABSENT for name in _REGIONS]
    return PageFormat(*sizes, *offsets)


def view_of(x: Tensor) -> TensorView:
    """The view of a tensor whose last dimension is contiguous; it keeps nothing alive."""
    batch, head, token, _ = x.stride()
    return TensorView(x.data_ptr(), batch, head, token, DTYPES[x.dtype])


NO_TENSOR = TensorView(None, 0, 0, 0, 0)


def readable(x: Tensor) -> Tensor:
    """``x`` itself, or a copy with a dtype and strides that kernels read."""
    if x.dtype not in DTYPES:
        x = x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
