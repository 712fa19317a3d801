"""A kernel that writes paged sequences and the chunks behind them as K and V in 16 bits; `expand` is the definition.

For chunks of many queries: expanding a page is one read and one write, reading its codes again for every tile of
queries is not (see README.md).
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboattention.ops.common.order_triton import token_at
from turboattention.ops.common.paged_kv import PagedGroup, PagedKV
from turboattention.ops.decode.launch import heads_tensor
from turboattention.ops.decode.tiles import PortableTile
from turboattention.quant.rotation import hadamard

# One H200, a page-wise prefix of 8,191 tokens and 8,160 new ones, 8 heads of 128, turbo4: 48.6 us; with 8 warps, 128
# channels and all the registers they want 55.2.
WARPS, COLUMNS, REGISTERS = 4, 64, 96  # COLUMNS: channels of a program


@triton.jit(
    do_not_specialize=["table_batch", "table_head", "tail_capacity"],
    # Numbers of some sequences of a batch begin anywhere.
    do_not_specialize_on_alignment=[
        "table_ptr", "lengths_ptr", "page_tokens_ptr", "tail_rows_ptr", "sink_rows_ptr", "cu_q_ptr", "cu_k_ptr"
    ],
)  # fmt: skip
def expand_kernel(
    pool_ptr, table_ptr, lengths_ptr, page_tokens_ptr, heads_ptr, signs_ptr, tail_key_ptr, tail_value_ptr, sink_key_ptr,
    sink_value_ptr, tail_rows_ptr, sink_rows_ptr, key_ptr, value_ptr, cu_q_ptr, cu_k_ptr, out_key_ptr, out_value_ptr,
    table_batch, table_head, tail_batch, tail_head, tail_token, sink_batch, sink_head, sink_token, tail_capacity,
    key_token, key_head, value_token, value_head, out_token, out_head,
    C: tl.constexpr, COLUMNS: tl.constexpr, SINKS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """``C.page`` tokens and COLUMNS channels of K or V of a KV head: of a page, or exact ones of tail and chunk.

    ROTATE: size of the Hadamard blocks to rotate V back by, 0 for none. signs_ptr: float16 ``[dim_padded,
    dim_padded]``, the signs of those blocks and 0 elsewhere.
    """
    PARTS: tl.constexpr = C.dim_padded // COLUMNS
    # K and V by programs of their own: half the registers, so that more of them hide each other's waits.
    of_value, group, row = tl.program_id(1) % 2, tl.program_id(1) // 2 // PARTS, tl.program_id(2)
    first = tl.load(cu_k_ptr + row)
    total = tl.load(cu_k_ptr + row + 1) - first
    begin = tl.program_id(0) * C.page
    if begin < total:
        length, page_tokens = tl.load(lengths_ptr + row), tl.load(page_tokens_ptr + row)
        far_row, head = row.to(tl.int64), tl.load(heads_ptr + group).to(tl.int64)
        channel = tl.program_id(1) // 2 % PARTS * COLUMNS + tl.arange(0, COLUMNS)
        token = begin + tl.arange(0, C.page)
        out = first.to(tl.int64) * out_token + head * out_head
        if begin < page_tokens:
            page = tl.load(table_ptr + far_row * table_batch + group.to(tl.int64) * table_head + tl.program_id(0))
            data = pool_ptr + page.to(tl.int64) * C.page_bytes
            sink_row = far_row
            if sink_rows_ptr is not None:
                sink_row = tl.load(sink_rows_ptr + row).to(tl.int64)
            sinks = sink_row * sink_batch + head * sink_head
            if of_value == 0:
                key = _key(data, channel, C)
                if begin < SINKS:
                    key = _with_sinks(key, sink_key_ptr + sinks, token, sink_token, channel, C, SINKS)
                _store(out_key_ptr + out, out_token, key, token, total, channel, C)
            else:
                value = _value(data, signs_ptr, channel, C, ROTATE)
                token = begin + token_at(tl.arange(0, C.page))
                if begin < SINKS:
                    value = _with_sinks(value, sink_value_ptr + sinks, token, sink_token, channel, C, SINKS)
                _store(out_value_ptr + out, out_token, value, token, total, channel, C)
        else:
            tail_row = far_row
            if tail_rows_ptr is not None:
                tail_row = tl.load(tail_rows_ptr + row).to(tl.int64)
            tail = tail_row * tail_batch + head * tail_head
            slot, place = token % tail_capacity, tl.load(cu_q_ptr + row) + token - length
            old, new = token < length, (token >= length) & (token < total)
            if of_value == 0:
                key = _rows(key_ptr + head * key_head, place, key_token, channel, new, C)
                exact = _rows(tail_key_ptr + tail, slot, tail_token, channel, old, C)
                _store(out_key_ptr + out, out_token, _either(old, exact, key), token, total, channel, C)
            else:
                value = _rows(value_ptr + head * value_head, place, value_token, channel, new, C)
                exact = _rows(tail_value_ptr + tail, slot, tail_token, channel, old, C)
                _store(out_value_ptr + out, out_token, _either(old, exact, value), token, total, channel, C)


@triton.jit
def _rows(data, row, stride, channel, wanted, C: tl.constexpr):
    """``channel`` of rows at ``data``, 0 where not ``wanted``."""
    mask = wanted[:, None] & (channel < C.head_dim)[None, :]
    return tl.load(data + row.to(tl.int64)[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _with_sinks(x, sinks, token, stride, channel, C: tl.constexpr, SINKS: tl.constexpr):
    """``x`` with the first SINKS tokens from ``sinks``."""
    first = token < SINKS
    return _either(first, _rows(sinks, token, stride, channel, first, C), x)


@triton.jit
def _either(which, rows, other):
    """``rows`` where ``which``, else those of ``other``, in its dtype."""
    return tl.where(which[:, None], rows.to(other.dtype), other)


@triton.jit
def _store(out, stride, x, token, total, channel, C: tl.constexpr):
    real = (token < total)[:, None] & (channel < C.head_dim)[None, :]
    tl.store(out + token.to(tl.int64)[:, None] * stride + channel[None, :], x.to(out.dtype.element_ty), mask=real)


@triton.jit
def _code(data, k, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Code ``k`` of a packed row of COUNT codes at ``data`` as int32 (see `quant.packing`)."""
    if BITS == 8:
        return tl.load(data + k).to(tl.int32)
    elif BITS == 3:
        low = _code(data, k, COUNT, 2)
        high = tl.load(data + COUNT // 4 + k % (COUNT // 8)).to(tl.int32) >> (k // (COUNT // 8))
        return low | ((high & 1) << 2)
    else:
        BYTES: tl.constexpr = COUNT * BITS // 8
        return (tl.load(data + k % BYTES).to(tl.int32) >> (k // BYTES * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _inside(channel, C: tl.constexpr):
    """``channel``, one of the page where head_dim is no power of two; else as it is, so that loads stay wide."""
    if C.head_dim == C.dim_padded:
        return channel
    else:
        return tl.minimum(channel, C.head_dim - 1)


@triton.jit
def _half(pointer):
    return tl.load(pointer.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _key(data, channel, C: tl.constexpr):
    """K of a page, float32 ``[tokens, len(channel)]``."""
    token = tl.arange(0, C.page)
    channel = _inside(channel, C)
    row = (data + C.key_codes + token * C.key_row_bytes)[:, None]
    code = _code(row, channel[None, :], C.head_dim, C.key_bits).to(tl.float32)
    if C.refined_channels > 0:
        j = tl.arange(0, C.refined_columns)
        inside = j < C.refined_channels
        index = tl.load(data + C.refined_index + j, mask=inside, other=0).to(tl.int32)
        j = tl.minimum(j, C.refined_channels - 1)
        rows = (data + C.refined_codes + j * (C.page * C.refined_bits // 8))[None, :]
        fine = _code(rows, token[:, None], C.page, C.refined_bits).to(tl.float16)
        # Small integers and one-hot columns: the product is exact.
        own = ((index[:, None] == channel[None, :]) & inside[:, None]).to(tl.float16)
        code += tl.dot(fine, own) * (1.0 / (1 << C.refined_bits))
    scale = tl.load(data + C.key_scale + channel).to(tl.float32) * (_half(data + C.key_page_scale) * (1.0 / 255.0))
    if C.key_symmetric:
        return (code - 0.5 * ((1 << C.key_bits) - 1)) * scale[None, :]
    else:
        zero = tl.load((data + C.key_zero).to(tl.pointer_type(tl.int8)) + channel).to(tl.float32)
        return code * scale[None, :] + (zero * (_half(data + C.key_page_zero) * (1.0 / 127.0)))[None, :]


@triton.jit
def _value(data, signs_ptr, channel, C: tl.constexpr, ROTATE: tl.constexpr):
    """V of a page, float32 ``[places, len(channel)]``, its tokens in stored order, rotated back."""
    place = tl.arange(0, C.page)
    token = token_at(place)
    scale = tl.load(data + C.value_scale + token).to(tl.float32) * (_half(data + C.value_page_scale) * (1.0 / 255.0))
    zero = tl.full([C.page], 0.0, tl.float32)
    if not C.value_symmetric:
        zero = tl.load((data + C.value_zero).to(tl.pointer_type(tl.int8)) + token).to(tl.float32)
        zero *= _half(data + C.value_page_zero) * (1.0 / 127.0)
    if ROTATE == 0:
        return tl.trans(_value_codes(data, channel, C)).to(tl.float32) * scale[:, None] + zero[:, None]
    else:
        # Codes are small and the matrix holds 0, 1 and -1, so sums are exact; what is equal in all channels of a token
        # comes back in the first channel of each block.
        stored = tl.arange(0, C.dim_padded)
        sign = tl.load(signs_ptr + stored[:, None] * C.dim_padded + channel[None, :])
        value = tl.dot(tl.trans(_value_codes(data, stored, C)), sign) * (scale * (1.0 / ROTATE**0.5))[:, None]
        block_first = (channel % ROTATE == 0).to(tl.float32)
        return value + (zero * ROTATE**0.5)[:, None] * block_first[None, :]


@triton.jit
def _value_codes(data, channel, C: tl.constexpr):
    """Codes of V as stored, float16 ``[len(channel), places]``, minus their middle where the format is symmetric."""
    row = (data + C.value_codes + _inside(channel, C) * C.value_row_bytes)[:, None]
    code = _code(row, tl.arange(0, C.page)[None, :], C.page, C.value_bits).to(tl.float16)
    if C.value_symmetric:
        code -= 0.5 * ((1 << C.value_bits) - 1)
    return code


@lru_cache(maxsize=16)
def _signs(dim: int, padded: int, device: torch.device) -> Tensor:
    """Signs of the Hadamard matrix, float16 ``[padded, padded]``; made once, because a copy would stall every step."""
    signs = hadamard(dim).sign()
    return torch.nn.functional.pad(signs, (0, padded - dim) * 2).to(device, torch.float16)


def expand_into(
    prefix: PagedKV, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int, keys: Tensor, values: Tensor
) -> None:
    """Write sequences and their chunks into ``keys`` and ``values`` ``[tokens, kv_heads, head_dim]``.

    The arguments of `expand_with_chunk`; longest: bound of the tokens of a sequence with its chunk.
    """
    for group in prefix.groups:
        _launch(prefix, group, key, value, cu_q, cu_k, longest, keys, values)


def _launch(
    prefix: PagedKV, group: PagedGroup, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int,
    keys: Tensor, values: Tensor,
) -> None:  # fmt: skip
    layout = group.layout
    tile = PortableTile.of(layout, 1, 64, "bytes")
    sinks = 0 if prefix.sink_key is None else prefix.sink_key.shape[2]
    sink_key, sink_value = (
        prefix.tail_key if x is None else x for x in (prefix.sink_key, prefix.sink_value)
    )  # fmt: skip
    dim = layout.head_dim
    assert prefix.tail_key.stride() == prefix.tail_value.stride()  # caches allocate them alike
    assert sink_key.stride() == sink_value.stride()  # as above
    rotate = dim & -dim if layout.value.rotated else 0
    signs = _signs(dim, tile.dim_padded, key.device) if rotate else None
    limit = {"maxnreg": REGISTERS} if key.is_cuda and torch.version.hip is None else {}
    grid = (-(-longest // layout.page_size), 2 * len(group.heads) * tile.dim_padded // COLUMNS, len(prefix.lengths))
    expand_kernel[grid](
        group.pool, group.table, prefix.lengths, prefix.page_tokens, heads_tensor(group.heads, key.device), signs,
        prefix.tail_key, prefix.tail_value, sink_key, sink_value, prefix.tail_rows,
        prefix.sink_rows if sinks else None, key, value, cu_q, cu_k, keys, values,
        group.table.stride(0), group.table.stride(1), *prefix.tail_key.stride()[:3], *sink_key.stride()[:3],
        prefix.tail_key.shape[2], *key.stride()[:2], *value.stride()[:2], *keys.stride()[:2],
        tile, COLUMNS=COLUMNS, SINKS=sinks, ROTATE=rotate, num_warps=WARPS, **limit,
    )  # fmt: skip
