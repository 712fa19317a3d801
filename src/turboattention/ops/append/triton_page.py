"""Device functions that turn one page of K and of V into bytes, bit for bit as `quant.codec.encode_pages`.

Every sum here is a sum of integers, or of two numbers: its order can't matter. All else is a maximum, a minimum or an
elementwise operation; kernels that call these functions must be launched with ``enable_fp_fusion=False``, because the
definition rounds each product and each sum.

K is held as ``[tokens, parts * width]``: the runs of channels that share bytes one after another, each padded to a
power of two. V is held as ``[tokens, channels]`` with its tokens in stored order. A page is packed by one integer sum.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

import triton
import triton.language as tl

# Bits of a fault word.
NOT_FINITE: tl.constexpr = tl.constexpr(1)  # NaN or Inf among the tokens, or a value beyond the storage dtype
BEYOND_FLOAT16: tl.constexpr = tl.constexpr(2)  # a scale or zero beyond 65504
# Adding and subtracting it rounds a float32 below 2^22 to an integer, ties to even; its bits are then those of an
# integer plus ROUNDER_BITS.
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)
ROUNDER_BITS: tl.constexpr = tl.constexpr(0x4B400000)
TINY: tl.constexpr = tl.constexpr(1e-12)
SMALLEST: tl.constexpr = tl.constexpr(2.0**-24)


@triton.jit
def rounded(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The nearest integer (int32), ties to even, from LOW to HIGH."""
    return (tl.minimum(tl.maximum(x, LOW), HIGH) + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def not_finite(x):
    """NOT_FINITE where any value of the tile is NaN or Inf, else 0."""
    bad = tl.where(tl.abs(x) < float("inf"), 0, NOT_FINITE)
    return tl.max(tl.max(bad, 1), 0)


@triton.jit
def key_channels(S: tl.constexpr):
    """Channel of each column of a tile of K, and whether the column holds one."""
    WIDTH: tl.constexpr = S.key_width
    COLUMNS: tl.constexpr = S.key_parts * WIDTH
    RUN: tl.constexpr = S.head_dim // S.key_parts
    column = tl.arange(0, COLUMNS)
    # Contiguous where there are no gaps, in a form that the compiler sees.
    channel = column if WIDTH == RUN else column // WIDTH * RUN + column % WIDTH
    return channel, column % WIDTH < RUN


@triton.jit
def stored_tokens(S: tl.constexpr):
    """Token of each row of a tile of V: groups of 32, index (2, 2, 4, 2) stored as (2, 4, 2, 2)."""
    TOKENS: tl.constexpr = S.page_size
    row = tl.arange(0, TOKENS)
    return (row & -16) | ((row & 2) << 2) | ((row & 12) >> 1) | (row & 1)


@triton.jit
def encode_key(x, valid, power, page, S: tl.constexpr):
    """Write all regions of K and the padding of a page.

    x: float32 ``[tokens, columns]`` in the order of `key_channels`, 0 in gaps. valid: int1 ``[tokens]``; the others
    widen no range. power: float32 ``[columns]``, weights of the choice of refined channels. page: where the page is.
    Returns the fault bits: NOT_FINITE or BEYOND_FLOAT16.
    """
    TOP: tl.constexpr = (1 << S.key_bits) - 1
    fault = not_finite(x)
    channel, live = key_channels(S)
    low = tl.min(tl.where(valid[:, None], x, float("inf")), 0)
    high = tl.max(tl.where(valid[:, None], x, float("-inf")), 0)
    some = tl.max(valid.to(tl.int32), 0) > 0
    low, high = tl.where(some, low, 0.0), tl.where(some, high, 0.0)
    x = tl.minimum(tl.maximum(x, low[None, :]), high[None, :])
    first, last = _grid(x, live[None, :], low, high, TOP, S.key_search, 0)
    scale, zero = tl.div_rn(last - first, TOP * 1.0), first
    if S.refined:
        FINE: tl.constexpr = (1 << (S.key_bits + S.refined_bits)) - 1
        UNIT: tl.constexpr = 1 << S.refined_bits
        refined, place = _choose(scale, power, live, S.refined)
        first, last = _grid(x, live[None, :], low, high, FINE, S.key_search, 0)
        scale = tl.where(refined, tl.div_rn(last - first, FINE * 1.0) * UNIT, scale)
        zero = tl.where(refined, first, zero)
    page_bits, page_scale, beyond = _page_number(tl.where(live, scale, 0.0))
    number = rounded(tl.div_rn(scale, tl.maximum(page_scale, SMALLEST)) * 255.0, 1.0, 255.0)
    scale = page_scale * tl.div_rn(number.to(tl.float32), 255.0)
    _store_float16(page + S.key_page_scale, page_bits)
    tl.store(page + S.key_scale + channel, number.to(tl.uint8), live)
    page_bits, page_zero, bad = _page_number(tl.where(live, zero, 0.0))
    beyond |= bad
    number = rounded(tl.div_rn(zero, tl.maximum(page_zero, SMALLEST)) * 127.0, -127.0, 127.0)
    zero = page_zero * tl.div_rn(number.to(tl.float32), 127.0)
    _store_float16(page + S.key_page_zero, page_bits)
    tl.store(page + S.key_zero + channel, (number & 255).to(tl.uint8), live)
    if S.refined:
        # One product for both kinds of channels: a refined one counts in finer steps up to a higher end.
        step = tl.where(refined, scale * (1.0 / UNIT), scale)
        end = tl.where(refined, FINE * 1.0, TOP * 1.0)
        position = (x - zero[None, :]) * tl.div_rn(1.0, tl.maximum(step, TINY))[None, :]
        fine = rounded(tl.minimum(position, end[None, :]), 0.0, FINE * 1.0)
        codes = fine >> tl.where(refined, S.refined_bits, 0)[None, :]
        _store_plane(fine & (UNIT - 1), refined, place, page, S)
        tl.store(page + S.key_refined_index + place, channel.to(tl.uint8), refined)
    else:
        codes = rounded((x - zero[None, :]) * tl.div_rn(1.0, tl.maximum(scale, TINY))[None, :], 0.0, TOP * 1.0)
    _store_key_codes(codes, page + S.key_codes, S)
    for i in tl.static_range(len(S.gap_starts)):
        gap = S.gap_starts[i] + tl.arange(0, 128)
        tl.store(page + gap, tl.zeros_like(gap).to(tl.uint8), gap < S.gap_ends[i])
    return tl.where(fault == 0, beyond, fault)


@triton.jit
def encode_value(x, valid, page, S: tl.constexpr):
    """Write all regions of V of a page; arguments as `encode_key`, ``x [tokens in stored order, channels]``."""
    TOP: tl.constexpr = (1 << S.value_bits) - 1
    TOKENS: tl.constexpr = S.page_size
    WIDTH: tl.constexpr = S.value_width
    x = tl.where(valid[:, None], x, 0.0)
    fault = not_finite(x)
    if S.rotation > 1:
        x = _rotated(x, TOKENS, WIDTH, S.rotation)
    live = tl.arange(0, WIDTH) < S.head_dim
    low = tl.min(tl.where(live[None, :], x, float("inf")), 1)
    high = tl.max(tl.where(live[None, :], x, float("-inf")), 1)
    if S.value_symmetric:
        high = tl.maximum(high, -low)
        low = -high
    first, last = _grid(x, live[None, :], low, high, TOP, S.value_search, 1)
    token = stored_tokens(S)
    scale, zero = tl.div_rn(last - first, TOP * 1.0), first
    page_bits, page_scale, beyond = _page_number(scale)
    number = rounded(tl.div_rn(scale, tl.maximum(page_scale, SMALLEST)) * 255.0, 1.0, 255.0)
    scale = page_scale * tl.div_rn(number.to(tl.float32), 255.0)
    _store_float16(page + S.value_page_scale, page_bits)
    tl.store(page + S.value_scale + token, number.to(tl.uint8))
    if S.value_symmetric:
        zero = scale * (-TOP / 2)
    else:
        page_bits, page_zero, bad = _page_number(zero)
        beyond |= bad
        number = rounded(tl.div_rn(zero, tl.maximum(page_zero, SMALLEST)) * 127.0, -127.0, 127.0)
        zero = page_zero * tl.div_rn(number.to(tl.float32), 127.0)
        _store_float16(page + S.value_page_zero, page_bits)
        tl.store(page + S.value_zero + token, (number & 255).to(tl.uint8))
    codes = rounded((x - zero[:, None]) * tl.div_rn(1.0, tl.maximum(scale, TINY))[:, None], 0.0, TOP * 1.0)
    _store_value_codes(codes, page + S.value_codes, S)
    return tl.where(fault == 0, beyond, fault)


@triton.jit
def _grid(x, live, low, high, TOP: tl.constexpr, SEARCH: tl.constexpr, AXIS: tl.constexpr):
    """Ends of the grid of each row or column: `affine.search_range` where SEARCH, else the range itself."""
    if SEARCH:
        middle, half = (low + high) * 0.5, (high - low) * 0.5
        inverse = tl.div_rn(1.0, tl.maximum(half, TINY))
        relative = (x - tl.expand_dims(middle, AXIS)) * tl.expand_dims(inverse, AXIS)
        best_error = tl.zeros_like(low).to(tl.int32) + 2147483647
        best_share = tl.zeros_like(low) + 1.0
        for index in range(9):
            share = tl.div_rn(tl.cast(20 - index, tl.float32), 20.0)
            position = relative * tl.div_rn(TOP * 1.0, 2.0 * share) + TOP / 2
            nearest = tl.minimum(tl.maximum((position + ROUNDER) - ROUNDER, 0.0), TOP * 1.0)
            distance = (position - nearest) * (tl.div_rn(2.0 * share, TOP * 1.0) * 4096.0)
            error = tl.sum(tl.where(live, (distance * distance).to(tl.int32), 0), AXIS)
            better = error < best_error
            best_error = tl.where(better, error, best_error)
            best_share = tl.where(better, share, best_share)
        half = best_share * half
        low, high = middle - half, middle + half
    return low, high


@triton.jit
def _choose(scale, power, live, COUNT: tl.constexpr):
    """Which channels are refined, and the place of each among them: `codec._choose_refined`, ties to the lowest."""
    COLUMNS: tl.constexpr = scale.shape[0]
    harm = tl.where(live, scale * scale * power, -1.0)
    column = tl.arange(0, COLUMNS)
    rank = tl.zeros_like(column)
    # By sixteens: all pairs at once would not fit the registers.
    rows = tl.reshape(harm, [COLUMNS // 16, 16])
    for index in range(COLUMNS // 16):
        other = tl.sum(tl.where((tl.arange(0, COLUMNS // 16) == index)[:, None], rows, 0.0), 0)[None, :]
        place = index * 16 + tl.arange(0, 16)
        ahead = (other > harm[:, None]) | ((other == harm[:, None]) & (place[None, :] < column[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    refined = rank < COUNT
    return refined, tl.cumsum(refined.to(tl.int32), 0) - 1


@triton.jit
def _page_number(x):
    """`two_level.page_maximum`: bits of the float16, its value, and BEYOND_FLOAT16 or 0."""
    exact = tl.max(tl.abs(x), 0)
    nearest = exact.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True).to(tl.int32)
    bits = tl.where(nearest.to(tl.float32) < exact, tl.minimum(bits + 1, 0x7BFF), bits)
    value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return bits, value, tl.where(exact < 65520.0, 0, BEYOND_FLOAT16)


@triton.jit
def _rotated(x, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`rotation.rotate` over the columns, in blocks of BLOCK."""
    for step in tl.static_range(8):
        if (1 << step) < BLOCK:
            x = _butterfly(x, TOKENS, WIDTH, 1 << step)
    return x * (BLOCK**-0.5)


@triton.jit
def _butterfly(x, TOKENS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    pairs = tl.reshape(x, [TOKENS, WIDTH // (2 * SIZE), 2, SIZE])
    second = (tl.arange(0, 2) == 1)[None, None, :, None]
    # The partner of each value: the sum of both bit patterns (which may wrap) less its own. It costs one exchange where
    # the partner is in another thread, and nothing where it is in the same.
    bits = pairs.to(tl.int32, bitcast=True)
    partner = (tl.sum(bits, 2, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    return tl.reshape(tl.where(second, partner - pairs, pairs + partner), [TOKENS, WIDTH])


@triton.jit
def _store_float16(where, bits):
    byte = tl.arange(0, 2)
    tl.store(where + byte, ((bits >> (8 * byte)) & 255).to(tl.uint8))


@triton.jit
def _store_key_codes(codes, where, S: tl.constexpr):
    """Pack along the columns: run k of the channels in bits ``k * bits`` of a byte."""
    TOKENS: tl.constexpr = S.page_size
    WIDTH: tl.constexpr = S.key_width
    PARTS: tl.constexpr = S.key_parts
    RUN: tl.constexpr = S.head_dim // PARTS
    rows = where + tl.arange(0, TOKENS)[:, None] * (S.head_dim * S.key_bits // 8)
    byte = tl.arange(0, WIDTH)[None, :]
    part = tl.arange(0, PARTS)[None, :, None]
    if S.key_bits == 3:
        # A byte of the plane of two bits holds quarters, of which each is two of the eighths in the tile.
        quarter = tl.arange(0, 4)[None, :, None]
        low = tl.sum(tl.reshape(codes & 3, [TOKENS, 4, 2 * WIDTH]) << (2 * quarter), 1)
        column = tl.arange(0, 2 * WIDTH)[None, :]
        tl.store(rows + column // WIDTH * RUN + column % WIDTH, low.to(tl.uint8), column % WIDTH < RUN)
        high = tl.sum(tl.reshape(codes >> 2, [TOKENS, PARTS, WIDTH]) << part, 1)
        tl.store(rows + 2 * RUN + byte, high.to(tl.uint8), byte < RUN)
    else:
        packed = tl.sum(tl.reshape(codes, [TOKENS, PARTS, WIDTH]) << (S.key_bits * part), 1)
        tl.store(rows + byte, packed.to(tl.uint8), byte < RUN)


@triton.jit
def _store_plane(low_bits, refined, place, page, S: tl.constexpr):
    """The lower bits ``[tokens, columns]`` of the refined channels, a row for each, packed along the tokens."""
    PARTS: tl.constexpr = 8 // S.refined_bits
    ROW: tl.constexpr = S.page_size // PARTS
    COLUMNS: tl.constexpr = S.key_parts * S.key_width
    part = tl.arange(0, PARTS)[:, None, None]
    packed = tl.sum(tl.reshape(low_bits, [PARTS, ROW, COLUMNS]) << (S.refined_bits * part), 0)
    where = page + S.key_refined_codes + place[None, :] * ROW + tl.arange(0, ROW)[:, None]
    tl.store(where, packed.to(tl.uint8), refined[None, :])


@triton.jit
def _store_value_codes(codes, where, S: tl.constexpr):
    """Pack along the rows, which are tokens in stored order: a row of bytes for each channel."""
    TOKENS: tl.constexpr = S.page_size
    BITS: tl.constexpr = S.value_bits
    rows = where + tl.arange(0, S.value_width)[None, :] * (TOKENS * BITS // 8)
    live = (tl.arange(0, S.value_width) < S.head_dim)[None, :]
    if BITS == 3:
        _store_parts(codes & 3, rows, live, TOKENS, S.value_width, 2)
        _store_parts(codes >> 2, rows + TOKENS // 4, live, TOKENS, S.value_width, 1)
    else:
        _store_parts(codes, rows, live, TOKENS, S.value_width, BITS)


@triton.jit
def _store_parts(codes, rows, live, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    PARTS: tl.constexpr = 8 // BITS
    part = tl.arange(0, PARTS)[:, None, None]
    packed = tl.sum(tl.reshape(codes, [PARTS, TOKENS // PARTS, WIDTH]) << (BITS * part), 0)
    tl.store(rows + tl.arange(0, TOKENS // PARTS)[:, None], packed.to(tl.uint8), live)
