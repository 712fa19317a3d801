"""Codes, scales and refined channels of a page as operands of the portable kernel (see `portable`)."""

import triton
import triton.language as tl

from turboattention.ops.common.order_triton import token_at


@triton.jit
def column_order(COLUMNS: tl.constexpr, PARTS: tl.constexpr, HOW: tl.constexpr):
    """For each column of `packed_codes`: its place in its part of the row, and which part."""
    k = tl.arange(0, COLUMNS * PARTS)
    if HOW == "bytes":
        return k % COLUMNS, k // COLUMNS
    else:
        # Even bytes of all words and parts, then odd bytes.
        WORDS: tl.constexpr = COLUMNS // 2
        return k % WORDS * 2 + k // (WORDS * PARTS), k // WORDS % PARTS


@triton.jit
def key_columns(C: tl.constexpr):
    """Channel and part of each column of the codes of K, and which columns are no padding."""
    COLUMNS: tl.constexpr = C.key_columns
    PARTS: tl.constexpr = C.key_parts
    HOW: tl.constexpr = C.key_how
    USED: tl.constexpr = C.head_dim // C.key_parts
    place, part = column_order(COLUMNS, PARTS, HOW)
    inside = place < USED
    return tl.where(inside, part * USED + place, 0), part, inside


@triton.jit
def token_columns(C: tl.constexpr):
    """Token and part of each column of the codes of V: the order of tokens in every product."""
    COLUMNS: tl.constexpr = C.value_columns
    PARTS: tl.constexpr = C.value_parts
    HOW: tl.constexpr = C.value_how
    place, part = column_order(COLUMNS, PARTS, HOW)
    return token_at(part * COLUMNS + place), part


@triton.jit
def refined_index(data, C: tl.constexpr):
    """The refined channels of a page."""
    k = tl.arange(0, C.refined_columns)
    return tl.load(data + C.refined_index + k, mask=k < C.refined_channels, other=0).to(tl.int32)


@triton.jit
def refined_queries(data, q_rows, unit, index, C: tl.constexpr):
    """Q times scale of the refined channels, in the unit of the scaled Q."""
    inside = tl.arange(0, C.refined_columns) < C.refined_channels
    scale = tl.load(data + C.key_scale + index, mask=inside, other=0).to(tl.float32) * (1.0 / (1 << C.refined_bits))
    q = tl.load(q_rows[None, :] + index[:, None]).to(tl.float32)  # padding: channel 0 with scale 0
    return (q * unit[None, :] * scale[:, None]).to(tl.float16)


@triton.jit
def refined_codes(data, C: tl.constexpr):
    """Codes of the lower plane, ``[tokens, refined channels]`` in the order of `token_columns`."""
    COLUMNS: tl.constexpr = C.refined_columns
    PARTS: tl.constexpr = 8 // C.refined_bits
    BYTES: tl.constexpr = C.page // PARTS
    k = tl.arange(0, COLUMNS)[:, None]
    at = k * BYTES + tl.arange(0, BYTES)[None, :]
    byte = tl.load(data + C.refined_codes + at, mask=k < C.refined_channels, other=0).to(tl.int16)
    shift = (tl.arange(0, PARTS) * C.refined_bits).to(tl.int16)
    fine = (byte[:, None, :] >> shift[None, :, None]) & ((1 << C.refined_bits) - 1)
    fine = fine.reshape(COLUMNS, C.page // 16, 2, 4, 2)
    fine = fine.permute(0, 1, 3, 2, 4) if C.value_how == "bytes" else fine.permute(0, 4, 1, 3, 2)
    fine = fine.reshape(COLUMNS, C.page).trans()
    if C.key_how == "bytes":
        return fine.to(tl.float16)
    else:
        return fine.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _inside(k, USED: tl.constexpr, SIZE: tl.constexpr):
    """``k``, of which there are SIZE, below USED: no mask, which would be a branch on AMD GPUs."""
    if USED == SIZE:
        return k
    else:
        return tl.minimum(k, USED - 1)


@triton.jit
def key_bytes(data, SIGNED: tl.constexpr, C: tl.constexpr):
    """A byte for each column of the codes of K as float16 (2^-24 of it where how is not 'bytes'); signed: plus 128."""
    HOW: tl.constexpr = C.key_how
    USED: tl.constexpr = C.head_dim // C.key_parts
    if HOW == "bytes":
        k = tl.arange(0, C.key_width)
        place = _inside(k % C.key_columns, USED, C.key_columns)
        byte = tl.load(data + (k // C.key_columns * USED + place))
        if SIGNED:
            byte = byte ^ 128
        return byte.to(tl.float16)
    else:
        WORDS: tl.constexpr = C.key_columns // 2
        k = tl.arange(0, C.key_width // 2)
        place = _inside(k % WORDS, USED // 2, WORDS)
        words = tl.load(data.to(tl.pointer_type(tl.int16)) + (k // WORDS * (USED // 2) + place))
        if SIGNED:
            words = words ^ -32640  # 0x8080
        return _beside(_unpack(words, 8, HOW))


@triton.jit
def packed_codes(
    data, row_offset, ROW_BYTES: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, HOW: tl.constexpr
):
    """Codes of packed rows, ``[rows, COLUMNS * parts]`` float16; as subnormals, those of part h times 2^(BITS * h).

    Columns that are padding hold any codes: Q is 0 there.
    """
    if HOW == "bytes":
        # A row of 3 bits is the low two bits packed as 2-bit codes, then the high bits packed in eighths.
        LOW: tl.constexpr = ROW_BYTES * 2 // 3 if BITS == 3 else ROW_BYTES
        byte = _inside(tl.arange(0, COLUMNS), LOW, COLUMNS)
        low = tl.load(data + row_offset[:, None] + byte[None, :])
        if BITS == 3:
            EIGHTH: tl.constexpr = ROW_BYTES // 3
            high = tl.load(data + row_offset[:, None] + (LOW + byte % EIGHTH)[None, :])
        PARTS: tl.constexpr = 4 if BITS == 3 else 8 // BITS
        parts = ()
        for h in tl.static_range(PARTS):
            if BITS == 3:
                bit = 2 * h + byte // EIGHTH
                code = ((low >> (2 * h)) & 3).to(tl.int32) | (((high.to(tl.int32) >> bit[None, :]) & 1) << 2)
            else:
                code = (low >> (BITS * h)) & ((1 << BITS) - 1)
            parts += (code.to(tl.float16),)  # type: ignore[assignment]
        return _beside(parts)
    else:
        word = _inside(tl.arange(0, COLUMNS // 2), ROW_BYTES // 2, COLUMNS // 2)
        words = tl.load(data.to(tl.pointer_type(tl.int16)) + (row_offset // 2)[:, None] + word[None, :])
        return _beside(_unpack(words, BITS, HOW))


@triton.jit
def _unpack(words, BITS: tl.constexpr, HOW: tl.constexpr):
    """Codes of 16-bit words as subnormals: a tensor for each part of the even bytes, then of the odd bytes."""
    if HOW == "asm":
        ASM: tl.constexpr = mask_asm(BITS)
        OUT: tl.constexpr = 16 // BITS
        return tl.inline_asm_elementwise(ASM, "=&r," * OUT + "r", [words], (tl.float16,) * OUT, True, 2)
    else:
        PARTS: tl.constexpr = 8 // BITS
        parts = ()
        for h in tl.static_range(2 * PARTS):
            code = (words >> (h // PARTS * 8)) & (((1 << BITS) - 1) << (h % PARTS * BITS))
            parts += (code.to(tl.int16).to(tl.float16, bitcast=True),)  # type: ignore[assignment]
        return parts


@triton.constexpr_function
def mask_asm(bits):
    """PTX of `_unpack` for two words: masks, and a shift for the odd bytes."""
    parts = 8 // bits
    masks = [((1 << bits) - 1) * 0x10001 << bits * h for h in range(parts)]
    even = [f"and.b32 ${h}, ${2 * parts}, {mask:#010x};" for h, mask in enumerate(masks)]
    odd = [f"and.b32 ${parts + h}, x, {mask:#010x};" for h, mask in enumerate(masks)]
    return " ".join(["{ .reg .b32 x;", *even, f"shr.u32 x, ${2 * parts}, 8;", *odd, "}"])


@triton.jit
def _beside(parts):
    """1, 2, 4 or 8 equal tensors side by side along the last dimension."""
    if len(parts) == 1:
        return parts[0]
    elif len(parts) == 2:
        return _flat(tl.join(parts[0], parts[1]))
    elif len(parts) == 4:
        return _beside((_flat(tl.join(parts[0], parts[1])), _flat(tl.join(parts[2], parts[3]))))
    else:
        return _beside((_beside(parts[:4]), _beside(parts[4:])))


@triton.jit
def _flat(pair):
    """``[..., n, 2]`` to ``[..., 2 n]``: the first of all pairs, then the second."""
    if len(pair.shape) == 2:
        return pair.permute(1, 0).reshape(2 * pair.shape[0])
    else:
        return pair.permute(0, 2, 1).reshape(pair.shape[0], 2 * pair.shape[1])
