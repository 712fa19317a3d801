"""Pages to bytes and back: the definition that every append kernel must match bit for bit."""

from typing import NamedTuple

import torch
from torch import Tensor

from turboattention.checks import to_float16
from turboattention.config import TensorFormat
from turboattention.quant import affine, two_level
from turboattention.quant.granularity import PerBlock, PerChannel
from turboattention.quant.layout import PageLayout
from turboattention.quant.packing import pack, permute_tokens, restore_tokens, unpack
from turboattention.quant.progressive import quantize_stage1, quantize_stage2, quantize_with_scale
from turboattention.quant.rotation import rotate


class Side(NamedTuple):
    """K or V of decoded pages: ``value = codes * scale + zero``, rotated when the format says so.

    codes: uint8 (or float16 when stored at 16 bits) ``[..., tokens, channels]``.
    scale, zero: float32 ``[..., tokens or 1, channels, groups or 1]``.
    refinement: fractions of a code to add to some channels, or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    refinement: "Refinement | None" = None

    def expand(self) -> Tensor:
        """The float32 values (still rotated)."""
        groups = self.scale.shape[-1]
        spread = self.codes.shape[-1] // groups if groups > 1 else 1
        scale, zero = (x.repeat_interleave(spread, -1) if spread > 1 else x for x in (self.scale, self.zero))
        codes = self.codes.float()
        if self.refinement is not None:
            channels, fraction = self.refinement.channels, self.refinement.codes * self.refinement.unit
            index = channels.unsqueeze(-2).expand(*codes.shape[:-1], -1)
            codes = codes.scatter_add(-1, index, fraction.transpose(-2, -1))
        return affine.dequantize(codes, scale, zero)


class Refinement(NamedTuple):
    """The lower plane of some channels: ``code + unit * refined code``.

    channels: int64 ``[..., refined]``; codes: uint8 ``[..., refined, tokens]``; unit: 2 ** -refined_bits.
    """

    channels: Tensor
    codes: Tensor
    unit: float


class Pages(NamedTuple):
    """Decoded pages of some heads."""

    key: Side
    value: Side


def encode_pages(
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    tile_scales: tuple[Tensor, Tensor] | None = None,
    query_power: Tensor | None = None,
) -> Tensor:
    """Compress full pages.

    key, value: ``[..., tokens, channels]``, any float dtype; K after RoPE.
    valid: bool ``[..., tokens]``; the others (padding, sink tokens) are stored but do not widen any range.
    query_power: squared queries per channel ``[..., channels]`` in any common unit, which say where errors of K matter;
        used to choose refined channels. None: all channels alike.
    tile_scales: FlashQ only: float16 ``[..., 1, 1]`` scales of K and V to use in stage 1 instead of the tile's own.
    Returns uint8 ``[..., layout.nbytes]``. Raises InvalidInputError when a value exceeds the range of float16.
    """
    pages = torch.zeros(*key.shape[:-2], layout.nbytes, dtype=torch.uint8, device=key.device)
    scales = tile_scales or (None, None)
    for side, fmt, x, tile_scale in (
        ("key", layout.key, key, scales[0]),
        ("value", layout.value, value, scales[1]),
    ):
        if fmt.bits == 16:
            layout.write(pages, f"{side}_codes", to_float16(side, x))
            continue
        x = x.float()
        if valid is not None:
            x = _neutralise(x, valid, fmt)
        if fmt.rotated:
            x = rotate(x)
        codes, metadata = _quantize(layout, fmt, x, tile_scale, query_power, side)
        layout.write(pages, f"{side}_codes", _pack_side(side, codes, fmt.bits))
        for name, values in metadata.items():
            layout.write(pages, f"{side}_{name}", values)
    return pages


def decode_pages(layout: PageLayout, pages: Tensor) -> Pages:
    """Codes and float32 metadata of uint8 ``pages`` ``[..., layout.nbytes]``."""
    return Pages(_decode_side(layout, pages, "key", layout.key), _decode_side(layout, pages, "value", layout.value))


def expand_pages(layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of pages as float32 ``[..., tokens, channels]``, rotation undone: the expanded form."""
    return _expand_side(layout, pages, "key", layout.key), _expand_side(layout, pages, "value", layout.value)


def expand_keys(layout: PageLayout, pages: Tensor) -> Tensor:
    """K alone of `expand_pages`: V costs as much again, and a rotation."""
    return _expand_side(layout, pages, "key", layout.key)


def _expand_side(layout: PageLayout, pages: Tensor, side: str, fmt: TensorFormat) -> Tensor:
    x = _decode_side(layout, pages, side, fmt).expand()
    return rotate(x) if fmt.rotated else x


def _neutralise(x: Tensor, valid: Tensor, fmt: TensorFormat) -> Tensor:
    mask = valid.unsqueeze(-1)
    if not isinstance(fmt.granularity, PerChannel | PerBlock):
        return torch.where(mask, x, 0.0)
    low = torch.where(mask, x, torch.inf).amin(-2, keepdim=True)
    high = torch.where(mask, x, -torch.inf).amax(-2, keepdim=True)
    empty = ~mask.any(-2, keepdim=True)
    return torch.where(empty, torch.zeros_like(x), torch.minimum(torch.maximum(x, low), high))


def _quantize(
    layout: PageLayout, fmt: TensorFormat, x: Tensor, tile_scale: Tensor | None, query_power: Tensor | None, side: str
) -> tuple[Tensor, dict[str, Tensor]]:
    if fmt.metadata == "flashq":
        stage1 = quantize_stage1(x)
        scale = stage1.scale if tile_scale is None else tile_scale.to(torch.float16)
        tile = stage1.codes if tile_scale is None else quantize_with_scale(x, scale)
        stage2 = quantize_stage2(tile, fmt.bits)
        return stage2.codes, {
            "page_scale": scale.expand(*x.shape[:-2], 1, 1).flatten(-2),
            "scale": stage2.scale.flatten(-2),
            "zero": stage2.offset.flatten(-2),
        }
    exact = affine.quantize(x, fmt.bits, fmt.granularity, symmetric=fmt.symmetric, search=fmt.search)
    flat = x.shape[:-2]
    scale, zero = exact.scale.reshape(*flat, -1), exact.zero.reshape(*flat, -1)
    metadata: dict[str, Tensor] = {}
    refined: Tensor | None = None
    if count := fmt.refined_channels(layout.head_dim):
        refined = _choose_refined(scale, query_power, count)
        # A finer grid has its own best range; its scale is kept in units of the upper plane.
        part = x.gather(-1, refined.unsqueeze(-2).expand(*x.shape[:-1], -1))
        finer = affine.quantize(part, fmt.bits + fmt.refined_bits, fmt.granularity, search=fmt.search)
        scale = scale.scatter(-1, refined, finer.scale.flatten(-2) * 2**fmt.refined_bits)
        zero = zero.scatter(-1, refined, finer.zero.flatten(-2))
        metadata["refined_index"] = refined
    if fmt.metadata == "float16":
        metadata["scale"], metadata["zero"] = to_float16(f"{side} scale", scale), to_float16(f"{side} zero", zero)
        scale, zero = metadata["scale"].float(), metadata["zero"].float()
    else:
        metadata["page_scale"], metadata["scale"] = two_level.round_scales(scale, f"{side} range")
        scale = two_level.expand_scales(metadata["page_scale"], metadata["scale"])
        if not fmt.symmetric:
            metadata["page_zero"], metadata["zero"] = two_level.round_zeros(zero, f"{side} zero")
            zero = two_level.expand_zeros(metadata["page_zero"], metadata["zero"])
    if fmt.symmetric:
        metadata.pop("zero", None)
        zero = _symmetric_zero(scale, fmt.bits)
    # The codes belong to the rounded metadata, which is what a reader will see.
    if refined is not None:
        return _encode_planes(fmt, x, scale.unsqueeze(-2), zero.unsqueeze(-2), refined, metadata)
    y, _ = affine.grouped(x, fmt.granularity)
    codes = affine.encode(y, scale.reshape(exact.scale.shape), zero.reshape(exact.scale.shape), fmt.bits)
    return affine.ungroup(codes, fmt.granularity), metadata


def _choose_refined(scale: Tensor, query_power: Tensor | None, count: int) -> Tensor:
    """Channels with the largest expected score error: query power x squared step. Ascending int64 ``[..., count]``."""
    harm = scale.square() if query_power is None else scale.square() * query_power
    # Stable, so that equal channels give the same page everywhere.
    order = harm.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(-1).values


def _encode_planes(
    fmt: TensorFormat, x: Tensor, scale: Tensor, zero: Tensor, refined: Tensor, metadata: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    codes = affine.encode(x, scale, zero, fmt.bits)
    index = refined.unsqueeze(-2).expand(*x.shape[:-1], -1)
    part_scale, part_zero = (s.gather(-1, refined.unsqueeze(-2)) for s in (scale, zero))
    unit = 2**fmt.refined_bits
    fine = affine.encode(x.gather(-1, index), part_scale / unit, part_zero, fmt.bits + fmt.refined_bits)
    metadata["refined_codes"] = pack((fine & (unit - 1)).transpose(-2, -1).contiguous(), fmt.refined_bits)
    return codes.scatter(-1, index, fine >> fmt.refined_bits), metadata


def _symmetric_zero(scale: Tensor, bits: int) -> Tensor:
    return scale * (-affine.levels(bits) / 2)


def _pack_side(side: str, codes: Tensor, bits: int) -> Tensor:
    return pack(codes, bits) if side == "key" else pack(permute_tokens(codes.transpose(-2, -1)), bits)


def _decode_side(layout: PageLayout, pages: Tensor, side: str, fmt: TensorFormat) -> Side:
    stored = layout.read(pages, f"{side}_codes")
    if fmt.bits == 16:
        one = torch.ones(*stored.shape[:-2], 1, 1, device=stored.device)
        return Side(stored, one, torch.zeros_like(one))
    codes = unpack(stored, fmt.bits)
    if side == "value":
        codes = restore_tokens(codes).transpose(-2, -1)
    shape = layout.scale_shape(fmt)
    scale = layout.read(pages, f"{side}_scale")
    if fmt.metadata == "float16":
        zero = _symmetric_zero(scale.float(), fmt.bits) if fmt.symmetric else layout.read(pages, f"{side}_zero").float()
        return Side(codes, scale.float().unflatten(-1, shape), zero.unflatten(-1, shape))
    page_scale = layout.read(pages, f"{side}_page_scale")
    if fmt.metadata == "flashq":
        unit = page_scale.float()
        zero = unit * layout.read(pages, f"{side}_zero").float()
        return Side(codes, (unit * scale.float()).unflatten(-1, shape), zero.unflatten(-1, shape))
    exact = two_level.expand_scales(page_scale, scale)
    if fmt.symmetric:
        zero = _symmetric_zero(exact, fmt.bits)
    else:
        zero = two_level.expand_zeros(layout.read(pages, f"{side}_page_zero"), layout.read(pages, f"{side}_zero"))
    refinement = None
    if fmt.refined_channels(layout.head_dim):
        low = unpack(layout.read(pages, f"{side}_refined_codes"), fmt.refined_bits)
        refinement = Refinement(layout.read(pages, f"{side}_refined_index").long(), low, 2.0**-fmt.refined_bits)
    return Side(codes, exact.unflatten(-1, shape), zero.unflatten(-1, shape), refinement)
