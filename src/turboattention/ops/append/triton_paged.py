"""A paged append in one launch for each group of heads: the kernel behind `paged.append_paged`, with the same bytes."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboattention.errors import UnsupportedError, invalid
from turboattention.ops.append.packed import Packed
from turboattention.ops.append.page_spec import page_spec, supports
from turboattention.ops.append.paged import When, check_step
from turboattention.ops.append.triton import DTYPES
from turboattention.ops.append.triton_page import encode_key, encode_value, key_channels, not_finite, stored_tokens
from turboattention.ops.common.paged_kv import PagedGroup, PagedKV

NO_ROOM: tl.constexpr = tl.constexpr(4)
MAX_ROWS = 16  # new tokens that a program copies at once, where there is more than one


def append_paged(
    kv: PagedKV,
    key: Tensor,
    value: Tensor,
    *,
    when: When,
    fault: Tensor,
    window: int = 0,
    counts: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    query_power: Tensor | None = None,
    queries: Tensor | None = None,
    packed: Packed | None = None,
) -> None:
    """Append the new tokens of each sequence; contract and arguments as `paged.append_paged`.

    Nothing waits for the device and no number of it is read: what is compressed is decided there, so a captured CUDA
    graph stays right as the sequences grow. Run once before capturing: the first call compiles. The pages of a row with
    a fault hold anything. Raises UnsupportedError for layouts that `supports` refuses.
    """
    check_step(
        kv, key, value, when=when, fault=fault, window=window, counts=counts, rope=rope, query_power=query_power,
        queries=queries, packed=packed,
    )  # fmt: skip
    _check_strides(kv, key, value, rope)
    for group in kv.groups:
        if reason := supports(group.layout):
            raise UnsupportedError(reason)
    # Before any group is written: a step that fails for want of memory can be taken again.
    every = tuple(range(kv.tail_key.shape[1]))
    heads = [None if group.heads == every else _head_numbers(group.heads, key.device) for group in kv.groups]
    for group, numbers in zip(kv.groups, heads, strict=True):
        _launch(group, numbers, kv, key, value, when, fault, window, counts, rope, query_power, queries, packed)


def _check_strides(kv: PagedKV, key: Tensor, value: Tensor, rope: tuple[Tensor, Tensor] | None) -> None:
    pairs = [("tail", kv.tail_key, kv.tail_value)]
    if kv.sink_key is not None and kv.sink_value is not None:
        pairs.append(("sinks", kv.sink_key, kv.sink_value))
    if rope is not None:
        pairs.append(("rope", *rope))
    for name, first, second in pairs:
        if first.stride() != second.stride() or first.stride(-1) != 1 or first.dtype != second.dtype:
            raise invalid(
                name, "two tensors of equal strides and dtype, contiguous in the last dimension", first.stride()
            )
    for name, x in (("key", key), ("value", value), ("tail", kv.tail_key)):
        if x.dtype not in DTYPES:
            raise invalid(name, "dtype float16, bfloat16 or float32", x.dtype)
    for group in kv.groups:
        if group.table.dtype != torch.int32 or not group.pool.is_contiguous():
            raise invalid("table and pool", "an int32 table and a contiguous pool", group.table.dtype)


@lru_cache(maxsize=256)
def _head_numbers(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The KV heads of a group on the device, made once: a copy from the host can't be part of a CUDA graph."""
    return torch.tensor(heads, dtype=torch.int32, device=device)


def _launch(
    group: PagedGroup,
    heads: Tensor | None,
    kv: PagedKV,
    key: Tensor,
    value: Tensor,
    when: When,
    fault: Tensor,
    window: int,
    counts: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    query_power: Tensor | None,
    queries: Tensor | None,
    packed: Packed | None,
) -> None:
    batch, kv_heads = len(kv.lengths), key.shape[1]
    n = key.shape[2] if packed is None else packed.longest
    new = [x.stride() if packed is None else (0, *x.stride()[1:]) for x in (key, value)]
    spec = page_spec(group.layout)
    sinks = kv.sink_key
    cos, sin = rope or (None, None)
    power = query_power if spec.refined else None
    observed = queries if power is not None else None
    chunk_pages = 0 if when == "before" else n // spec.page_size
    # With 128 registers twice as many programs run at once: one H200, 8 heads of 128, 8,192 tokens: turbo4 takes 200
    # instead of 215 us, turbo2 313 instead of 380 (throw-away script). A decode step has too few programs for that.
    many = n > 1 and spec.num_warps == 4 and key.is_cuda and torch.version.hip is None
    limit = {"maxnreg": 128} if many else {}
    append_kernel[(1 + chunk_pages, len(group.heads), batch)](
        key, value, cos, sin, counts, kv.tail_key, kv.tail_value, sinks, kv.sink_value, group.pool, group.table,
        heads,
        kv.lengths, kv.page_tokens, kv.tail_rows, kv.sink_rows if sinks is not None else None,
        power, observed, fault, None if packed is None else packed.starts,
        n, window, kv.tail_key.shape[2], kv_heads, group.table.shape[2], group.pool.shape[0],
        *new[0], *new[1], *kv.tail_key.stride()[:3],
        *((0, 0, 0) if sinks is None else sinks.stride()[:3]),
        *((0, 0) if cos is None else (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))),
        *group.table.stride(), *((0, 0, 0) if observed is None else observed.stride()),
        S=spec, BEFORE=when == "before", SINKS=0 if sinks is None else sinks.shape[2],
        ANGLES=0 if cos is None else cos.shape[2], ROWS=1 if n == 1 else MAX_ROWS,
        RATIO=0 if observed is None else observed.shape[1] // kv_heads,
        num_warps=spec.num_warps, enable_fp_fusion=False, **limit,
    )  # fmt: skip


# What changes from step to step must not compile the kernel again; numbers of some sequences of a batch begin anywhere.
@triton.jit(
    do_not_specialize=["new_tokens", "window", "table_pages", "pool_pages"],
    do_not_specialize_on_alignment=[
        "counts", "table", "lengths", "page_tokens", "tail_rows", "sink_rows", "fault", "starts"
    ],
)  # fmt: skip
def append_kernel(
    key, value, cos, sin, counts, tail_key, tail_value, sink_key, sink_value, pool, table, heads,
    lengths, page_tokens, tail_rows, sink_rows, power, queries, fault, starts,
    new_tokens, window, capacity, kv_heads, table_pages, pool_pages,
    key_b, key_h, key_t, key_d, value_b, value_h, value_t, value_d, tail_b, tail_h, tail_t,
    sink_b, sink_h, sink_t, angle_b, angle_t, table_b, table_h, table_p, query_b, query_h, query_d,
    S: tl.constexpr, BEFORE: tl.constexpr, SINKS: tl.constexpr, ANGLES: tl.constexpr, ROWS: tl.constexpr,
    RATIO: tl.constexpr,
):  # fmt: skip
    """Programs ``(part, head of the group, row)``.

    Part 0 encodes the pages that hold tokens of the tail and only then overwrites the tail; part i > 0 encodes the i-th
    page that lies wholly in the new tokens, straight from them. RATIO: queries of a KV head that part 0 adds to
    ``power`` where the step has one token, 0 for none.
    """
    part = tl.program_id(0)
    place = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    head = place
    if heads is not None:
        head = tl.load(heads + place).to(tl.int64)
    SIZE: tl.constexpr = S.page_size
    length = tl.load(lengths + row)
    paged = tl.load(page_tokens + row)
    end = length + new_tokens
    if counts is not None:
        end = length + tl.minimum(tl.load(counts + row), new_tokens)
    limit = tl.maximum((length if BEFORE else end) - window, 0)
    own = (length + SIZE - 1) // SIZE
    begin = tl.where(part == 0, paged // SIZE, tl.maximum(own + part - 1, paged // SIZE))
    stop = tl.minimum(limit // SIZE, tl.where(part == 0, own, own + part))

    tail_row, sink_row = row, row
    if tail_rows is not None:
        tail_row = tl.load(tail_rows + row).to(tl.int64)
    if sink_rows is not None:
        sink_row = tl.load(sink_rows + row).to(tl.int64)
    key += row * key_b + head * key_h
    value += row * value_b + head * value_h
    if starts is not None:
        start = tl.load(starts + row).to(tl.int64)
        key += start * key_t
        value += start * value_t
    tail_key += tail_row * tail_b + head * tail_h
    tail_value += tail_row * tail_b + head * tail_h
    if power is not None:
        power += (tail_row * kv_heads + head) * S.head_dim
    if RATIO > 0:
        queries += row * query_b + head * RATIO * query_h
    if ANGLES > 0:
        cos += row * angle_b
        sin += row * angle_b
    table += row * table_b + place * table_h
    seen = 0
    # Loops with conditions, because Triton's interpreter can't count to a number that was loaded.
    index = begin
    while index < stop:
        inside = index < table_pages
        number = tl.load(table + index * table_p, inside, -1)
        if (number >= 0) & (number < pool_pages):
            page = pool + number.to(tl.int64) * S.nbytes
            token = index * SIZE + tl.arange(0, SIZE)
            channel, live = key_channels(S)
            x = _old(tail_key, token, length, channel, live, capacity, tail_t)
            if not BEFORE:
                new = _new_key(
                    key, cos, sin, token - length, token >= length, channel, live, key_t, key_d, angle_t,
                    S.head_dim, ANGLES, tail_key.dtype.element_ty,
                )  # fmt: skip
                x = tl.where((token < length)[:, None], x, new)
            weight = 1.0
            if power is not None:
                weight = tl.load(power + channel, live, 0.0)
            if RATIO > 0:
                weight += _squares(queries, channel, live & (end > length), query_h, query_d, RATIO)
            seen |= encode_key(x, token >= SINKS, weight, page, S)
            token = index * SIZE + stored_tokens(S)
            channel = tl.arange(0, S.value_width)
            live = channel < S.head_dim
            x = _old(tail_value, token, length, channel, live, capacity, tail_t)
            if not BEFORE:
                new = _new(value, token - length, token >= length, channel, live, value_t, value_d)
                x = tl.where((token < length)[:, None], x, _as_stored(new, tail_value.dtype.element_ty))
            seen |= encode_value(x, token >= SINKS, page, S)
        else:
            seen |= NO_ROOM
        index += 1

    if part == 0:
        # All threads have read the slots that are overwritten now.
        tl.debug_barrier()
        channel = tl.arange(0, S.value_width)
        live = channel < S.head_dim
        if RATIO > 0:
            squares = _squares(queries, channel, live & (end > length), query_h, query_d, RATIO)
            tl.store(power + channel, tl.load(power + channel, live, 0.0) + squares, live)
        first = tl.maximum(length, tl.maximum(paged, limit // SIZE * SIZE))
        while first < end:
            token = first + tl.arange(0, ROWS)
            where = (token % capacity).to(tl.int64)[:, None] * tail_t + channel[None, :]
            seen |= _copy(
                key, value, cos, sin, tail_key + where, tail_value + where, token - length, token < end, channel, live,
                key_t, key_d, value_t, value_d, angle_t, S.head_dim, ANGLES,
            )  # fmt: skip
            first += ROWS
        if SINKS > 0:
            first = length
            while first < tl.minimum(end, SINKS):
                token = first + tl.arange(0, ROWS)
                where = sink_row * sink_b + head * sink_h + token.to(tl.int64)[:, None] * sink_t + channel[None, :]
                seen |= _copy(
                    key, value, cos, sin, sink_key + where, sink_value + where, token - length,
                    token < tl.minimum(end, SINKS), channel, live,
                    key_t, key_d, value_t, value_d, angle_t, S.head_dim, ANGLES,
                )  # fmt: skip
                first += ROWS
    if seen != 0:
        tl.atomic_or(fault + row, seen)


@triton.jit
def _squares(queries, channel, live, query_h, query_d, RATIO: tl.constexpr):
    """Squares of the channels of RATIO query heads, added in the order of the heads."""
    total = tl.zeros(channel.shape, tl.float32)
    for i in tl.static_range(RATIO):
        x = tl.load(queries + i * query_h + channel * query_d, live, 0.0).to(tl.float32)
        total += x * x
    return total


@triton.jit
def _old(tail, token, length, channel, live, capacity, tail_t):
    """Tokens of the tail ``[tokens, channels]`` in float32, 0 where they are not in it."""
    where = (token % capacity).to(tl.int64)[:, None] * tail_t + channel[None, :]
    return tl.load(tail + where, (token < length)[:, None] & live[None, :], 0.0).to(tl.float32)


@triton.jit
def _new(x, index, mask, channel, live, x_t, x_d):
    """New tokens ``[tokens, channels]`` in float32, 0 where masked."""
    where = index.to(tl.int64)[:, None] * x_t + channel[None, :] * x_d
    return tl.load(x + where, mask[:, None] & live[None, :], 0.0).to(tl.float32)


@triton.jit
def _new_key(
    key, cos, sin, index, mask, channel, live, key_t, key_d, angle_t,
    DIM: tl.constexpr, ANGLES: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """New tokens of K after RoPE, rounded to the storage dtype, in float32."""
    x = _new(key, index, mask, channel, live, key_t, key_d)
    if ANGLES > 0:
        HALF: tl.constexpr = DIM // 2
        first = channel < HALF
        partner = _new(key, index, mask, tl.where(first, channel + HALF, channel - HALF), live, key_t, key_d)
        turned = tl.where(first[None, :], -partner, partner)
        angle = channel if ANGLES == DIM else tl.where(first, channel, channel - HALF)
        turned *= _new(sin, index, mask, angle, live, angle_t, 1)
        x = x * _new(cos, index, mask, angle, live, angle_t, 1) + turned
    return _as_stored(x, STORED)


@triton.jit
def _as_stored(x, STORED: tl.constexpr):
    """float32 ``x`` rounded to the nearest value of STORED, ties to even."""
    if STORED == tl.bfloat16:  # noqa: SIM300 - the capitals are no constant of Python
        # By hand, because Triton's interpreter cuts instead. NaN must stay NaN.
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(STORED).to(tl.float32)


@triton.jit
def _copy(
    key, value, cos, sin, to_key, to_value, index, mask, channel, live,
    key_t, key_d, value_t, value_d, angle_t, DIM: tl.constexpr, ANGLES: tl.constexpr,
):  # fmt: skip
    """Copy new tokens of K (after RoPE) and of V; returns the fault bits."""
    STORED: tl.constexpr = to_key.dtype.element_ty
    keep = mask[:, None] & live[None, :]
    x = _new_key(key, cos, sin, index, mask, channel, live, key_t, key_d, angle_t, DIM, ANGLES, STORED)
    tl.store(to_key, x.to(STORED), keep)
    fault = not_finite(x)
    x = _as_stored(_new(value, index, mask, channel, live, value_t, value_d), STORED)
    tl.store(to_value, x.to(STORED), keep)
    return fault | not_finite(x)
