"""Codes to bytes and back along the last dimension.

n codes of 4 bits: code i in the low nibble and code i + n/2 in the high nibble of byte i, so that a kernel gets two
contiguous runs from one mask and one shift. 2 bits: four quarters, code i + k * n/4 in bits 2k of byte i. 3 bits: a
2-bit plane (the low bits) followed by a 1-bit plane (eighths, code i + k * n/8 in bit k). 8 bits: one byte each.

V pages store tokens in permuted order: inside each group of 32 the index (2, 2, 4, 2) is stored as (2, 4, 2, 2), which
makes the registers of P left by the first product the operand of the second (see docs/numerics.md).
"""

import torch
from torch import Tensor

TOKEN_GROUP = 32


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` codes; ``count`` must be a multiple of 8 (of 16 channels or 32 tokens in every page)."""
    return count * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes ``[..., n]`` below 2^bits -> uint8 bytes ``[..., n * bits / 8]``."""
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), _pack_parts(codes >> 2, 1)], dim=-1)
    return _pack_parts(codes, bits)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    if bits == 3:
        low_bytes = packed.shape[-1] * 2 // 3
        return _unpack_parts(packed[..., :low_bytes], 2) | (_unpack_parts(packed[..., low_bytes:], 1) << 2)
    return _unpack_parts(packed, bits)


def _pack_parts(codes: Tensor, bits: int) -> Tensor:
    parts = codes.unflatten(-1, (8 // bits, -1))
    out: Tensor = parts[..., 0, :].clone()
    for k in range(1, 8 // bits):
        out |= parts[..., k, :] << (k * bits)
    return out


def _unpack_parts(packed: Tensor, bits: int) -> Tensor:
    mask = 2**bits - 1
    return torch.cat([(packed >> (k * bits)) & mask for k in range(8 // bits)], dim=-1)


def permute_tokens(x: Tensor) -> Tensor:
    """Token order -> stored order along the last dimension (a multiple of 32)."""
    stored: Tensor = x.unflatten(-1, (-1, 2, 2, 4, 2)).transpose(-3, -2).flatten(-5)
    return stored


def restore_tokens(x: Tensor) -> Tensor:
    """The inverse of `permute_tokens`."""
    tokens: Tensor = x.unflatten(-1, (-1, 2, 4, 2, 2)).transpose(-3, -2).flatten(-5)
    return tokens
