"""The structs of ``kernels/abi.h``, field by field, and the way from numbers to their bytes.

A call describes itself anew each time, for each of a model's layers: `pack` fills a struct in a tenth of the time that
the fields of a `ctypes.Structure` take.
"""

import ctypes
import struct
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from turboattention.quant.layout import PageLayout

ABI_VERSION = 3
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
        *((name, c_int32) for name in ("causal", "window", "sinks", "capacity", "split")),
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


View = tuple[int, int, int, int, int]  # the numbers of a TensorView
NO_TENSOR: View = (0, 0, 0, 0, 0)
_CODES = {c_int32: "i", c_int64: "q", c_float: "f"}  # all others are pointers


@cache
def page_format(layout: PageLayout) -> PageFormat:
    """The numbers of ``layout``, two-level with K per channel and V per token. Kept: kernels hold its address."""
    key, value = layout.key, layout.value
    refined = key.refined_channels(layout.head_dim)
    sizes = (
        layout.page_size, layout.head_dim, layout.nbytes, key.bits, int(key.search), refined,
        key.refined_bits if refined else 0, value.bits, int(value.search),
        layout.head_dim & -layout.head_dim if value.rotated else 1,
    )  # fmt: skip
    offsets = [layout.regions[name].offset if name in layout.regions else ABSENT for name in _REGIONS]
    return PageFormat(*sizes, *offsets)


@cache
def format_address(layout: PageLayout) -> int:
    """Where the numbers of ``layout`` stand."""
    return ctypes.addressof(page_format(layout))


def view_of(x: Tensor, alive: list[Tensor]) -> View:
    """The view of a tensor ``[batch, heads, tokens, head_dim]``.

    Where its dtype or strides are not those that kernels read, of a copy. The viewed tensor joins ``alive``.
    """
    batch, head, token, channel = x.stride()
    if channel != 1 or x.dtype not in DTYPES:
        x = (x if x.dtype in DTYPES else x.float()).contiguous()
        batch, head, token, _ = x.stride()
    alive.append(x)
    return x.data_ptr(), batch, head, token, DTYPES[x.dtype]


def pack(kind: type[ctypes.Structure], *numbers: int | float) -> bytes:
    """The bytes of a struct from its numbers, in order: those of nested structs in their place, 0 for no pointer."""
    return _layout(kind).pack(*numbers)


@cache
def _layout(kind: type[ctypes.Structure]) -> struct.Struct:
    return struct.Struct("=" + "".join(_codes(kind)))


def _codes(kind: type[ctypes.Structure]) -> list[str]:
    """A code of `struct` for each number, and the gaps between them."""
    codes, at = [], 0
    fields: Any = kind._fields_
    for name, of in chain(fields, [("", None)]):
        begin = getattr(kind, name).offset if name else ctypes.sizeof(kind)
        codes.append("x" * (begin - at))
        if of is not None:
            codes += _codes(of) if issubclass(of, ctypes.Structure) else [_CODES.get(of, "Q")]
            at = begin + ctypes.sizeof(of)
    return codes
