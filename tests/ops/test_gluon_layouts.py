"""The bit permutations of the Gluon decode kernel, replayed in NumPy on pages of known codes (no GPU needed)."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from turboattention.quant.packing import pack, permute_tokens

lay = pytest.importorskip("turboattention.ops.decode.gluon_layouts", reason="needs Triton with Gluon")

Codes = NDArray[np.int64]
HEAD_DIMS, BITS = (64, 128, 256), (8, 4, 2)


def joined(parts: list[Codes]) -> Codes:
    """What ``gl.join`` of pairs, then of pairs of pairs, ... makes: new last dimensions."""
    while len(parts) > 1:
        parts = [np.stack(parts[i : i + 2], -1) for i in range(0, len(parts), 2)]
    return parts[0]


def words_of(data: torch.Tensor) -> Codes:
    return data.contiguous().numpy().reshape(-1).view(np.uint16).astype(np.int64)


def unpacked(words: Codes, bits: int) -> Codes:
    """`gluon_common.unpack`, codes shifted back."""
    parts, mask = range(8 // bits), (1 << bits) - 1
    return joined([words >> bits * h & mask for h in parts] + [words >> 8 + bits * h & mask for h in parts])


def permuted(codes: Codes, order: list[int], *shape: int) -> Codes:
    return codes.reshape([2] * len(order)).transpose(order).reshape(shape)


def rows(value_bits: int) -> Codes:
    """Token of each row of the scores."""
    tokens = [sum((m >> lay.row_position(value_bits, i) & 1) << i for i in range(6)) for m in range(64)]
    assert sorted(tokens) == list(range(64))
    return np.array(tokens)


def columns(head_dim: int, bits: int) -> Codes:
    """Channel of each column of K, by the formula of the kernel."""
    k, parts, row_words = np.arange(head_dim), 8 // bits, head_dim * bits // 16
    inside = (k & 1) * 2 + (k >> 1 & 3) * (row_words // 2) + (k >> 3 & 1) + k // (16 * parts) * 4
    channels: Codes = inside + (k >> 4 & parts - 1) * (head_dim // parts)
    assert sorted(channels) == list(range(head_dim))
    return channels


@pytest.mark.parametrize("value_bits", BITS)
@pytest.mark.parametrize("key_bits", BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_code_of_k_lands_in_its_row_and_column(head_dim: int, key_bits: int, value_bits: int):
    codes = torch.randint(0, 2**key_bits, (64, head_dim), dtype=torch.uint8)
    found = unpacked(words_of(pack(codes, key_bits)), key_bits)
    found = permuted(found, lay.key_codes_order(head_dim, key_bits, value_bits), 64, head_dim)
    assert (found == codes.numpy()[rows(value_bits)][:, columns(head_dim, key_bits)]).all()


@pytest.mark.parametrize("key_bits", BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scales_of_k_land_in_their_columns(head_dim: int, key_bits: int):
    scales = torch.randint(0, 256, (head_dim,), dtype=torch.uint8)
    found = permuted(unpacked(words_of(scales), 8), lay.key_scale_order(head_dim, key_bits), head_dim)
    assert (found == scales.numpy()[columns(head_dim, key_bits)]).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_code_of_v_lands_in_its_channel_and_token(head_dim: int, bits: int):
    codes = torch.randint(0, 2**bits, (64, head_dim), dtype=torch.uint8)
    packed = pack(permute_tokens(codes.T.contiguous()), bits)
    found = permuted(unpacked(words_of(packed), bits), lay.value_codes_order(head_dim, bits), head_dim, 64)
    assert (found == codes.numpy().T[:, rows(bits)]).all()


@pytest.mark.parametrize("bits", BITS)
def test_scales_of_v_and_parts_of_a_byte_follow_the_rows(bits: int):
    scales = torch.randint(0, 256, (64,), dtype=torch.uint8)
    found = permuted(unpacked(words_of(scales), 8), lay.value_scale_order(bits), 64)
    assert (found == scales.numpy()[rows(bits)]).all()
    place = {int(token): u for u, token in enumerate(permute_tokens(torch.arange(64)))}
    parts, first_bit = 8 // bits, 6 - (8 // bits).bit_length() + 1
    assert [place[int(t)] * parts // 64 for t in rows(bits)] == [m >> first_bit & parts - 1 for m in range(64)]


@pytest.mark.parametrize("refined_bits", (1, 2))
@pytest.mark.parametrize("channels", (16, 32, 64))
@pytest.mark.parametrize("value_bits", BITS)
def test_refined_codes_land_in_their_row_and_channel(value_bits: int, channels: int, refined_bits: int):
    codes = torch.randint(0, 2**refined_bits, (channels, 64), dtype=torch.uint8)
    words = words_of(pack(codes, refined_bits)).reshape(channels // 8, -1)
    steps = [shift for _, shift in lay.refined_shifts(refined_bits, value_bits, True)]
    lanes = np.array([sum((i >> j & 1) * step for j, step in enumerate(steps)) for i in range(2 ** len(steps))])
    assert lay.lane_shifts(refined_bits, value_bits) == len(lanes)
    shifts = [0]
    for _, shift in lay.refined_shifts(refined_bits, value_bits, False):
        shifts += [s + shift for s in shifts]
    shifts += [8 + s for s in shifts]
    assert lay.refined_outputs(refined_bits, value_bits) == len(shifts)
    mask = (1 << refined_bits) - 1
    pieces = [joined([(piece[:, None] >> lanes) >> s & mask for s in shifts]) for piece in words]
    found = permuted(joined(pieces), lay.refined_order(channels, refined_bits, value_bits), 64, channels)
    assert (found == codes.numpy().T[rows(value_bits)]).all()
