"""Every code at every position, and the byte positions that kernels rely on, written out by loops."""

import pytest
import torch

from turboattention.quant.packing import pack, packed_bytes, permute_tokens, restore_tokens, unpack

BITS = (2, 3, 4, 8)


def byte_positions(index: int, count: int, bits: int) -> list[tuple[int, int, int, int]]:
    """Where a code goes: (byte, lowest bit there, lowest bit of the code, bits), from the documented layout."""
    if bits == 8:
        return [(index, 0, 0, 8)]
    if bits == 4:
        return [(index, 0, 0, 4)] if index < count // 2 else [(index - count // 2, 4, 0, 4)]
    quarter, eighth = count // 4, count // 8
    low = (index % quarter, 2 * (index // quarter), 0, 2)
    return [low] if bits == 2 else [low, (quarter + index % eighth, index // eighth, 2, 1)]


def slow_pack(codes: list[int], bits: int) -> list[int]:
    out = [0] * (len(codes) * bits // 8)
    for index, code in enumerate(codes):
        for byte, shift, first, width in byte_positions(index, len(codes), bits):
            out[byte] |= (code >> first & (1 << width) - 1) << shift
    return out


@pytest.mark.parametrize("count", (32, 64, 80, 96, 128, 256))
@pytest.mark.parametrize("bits", BITS)
def test_every_code_at_every_position(bits: int, count: int):
    for background in (0, 2**bits - 1):
        codes = torch.full((2**bits, count, count), background, dtype=torch.uint8)
        values = torch.arange(2**bits, dtype=torch.uint8)[:, None, None]
        codes = torch.where(torch.eye(count, dtype=torch.bool), values, codes) if bits < 8 else codes[::17]
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.shape[-1] == packed_bytes(count, bits) == count * bits // 8
        assert torch.equal(unpack(packed, bits), codes)
    for position in (0, 1, count // 8, count // 4, count // 2 - 1, count // 2, count - 1):
        for code in range(2**bits):
            row = [0] * count
            row[position] = code
            assert pack(torch.tensor(row, dtype=torch.uint8), bits).tolist() == slow_pack(row, bits), (position, code)


@pytest.mark.parametrize("rows", (1, 3, 63))
@pytest.mark.parametrize("bits", BITS)
def test_random_rows_against_loop(bits: int, rows: int):
    codes = torch.randint(0, 2**bits, (rows, 80), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.tolist() == [slow_pack(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(packed, bits), codes)


def test_bytes_by_hand():
    codes = torch.tensor([1, 2, 3, 0, 2, 1, 0, 3], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [0x21, 0x12, 0x03, 0x30]
    # Quarters (1, 2), (3, 0), (2, 1), (0, 3), lowest bits first.
    assert pack(codes, 2).tolist() == [1 | 3 << 2 | 2 << 4 | 0 << 6, 2 | 0 << 2 | 1 << 4 | 3 << 6]
    # Low planes of 5, 2, 7, 0, 6, 1, 4, 3 are 1, 2, 3, 0, 2, 1, 0, 3; the high bits 1, 0, 1, 0, 1, 0, 1, 0.
    three = torch.tensor([5, 2, 7, 0, 6, 1, 4, 3], dtype=torch.uint8)
    assert pack(three, 3).tolist() == [1 | 3 << 2 | 2 << 4, 2 | 1 << 4 | 3 << 6, 0b01010101]


def test_pack_keeps_its_input():
    codes = torch.randint(0, 4, (5, 64), dtype=torch.uint8)
    before = codes.clone()
    pack(codes, 2)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("tokens", (32, 64, 128))
def test_token_order_inside_groups_of_32(tokens: int):
    """Token index (a, b, c, d) of sizes (2, 2, 4, 2) is stored at (a, c, b, d)."""
    stored = permute_tokens(torch.arange(tokens)).tolist()
    for token in range(tokens):
        group, inside = divmod(token, 32)
        a, b, c, d = inside // 16, inside // 8 % 2, inside // 2 % 4, inside % 2
        assert stored[group * 32 + a * 16 + c * 4 + b * 2 + d] == token
    assert stored[:8] == [0, 1, 8, 9, 2, 3, 10, 11]
    assert restore_tokens(permute_tokens(torch.arange(tokens))).tolist() == list(range(tokens))


def test_value_byte_holds_tokens_half_a_page_apart():
    codes = torch.arange(64, dtype=torch.uint8) % 16
    packed = pack(permute_tokens(codes), 4)
    order = permute_tokens(torch.arange(64)).tolist()
    for byte, (low, high) in enumerate(zip(order[:32], order[32:], strict=True)):
        assert high == low + 32
        assert packed[byte].item() == low % 16 | (high % 16) << 4
