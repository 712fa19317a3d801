"""Bytes of a page against sums written out by hand, for every preset and head dimension."""

import pytest
import torch

from turboattention.config import TensorFormat, presets
from turboattention.errors import InvalidInputError
from turboattention.quant.codec import encode_pages
from turboattention.quant.granularity import PerBlock, PerChannel, PerGroup, PerToken
from turboattention.quant.layout import PageLayout

DIMS = (64, 80, 96, 128, 256)


def turbo_bytes(dim: int, bits: int, refined: int = 0, refined_bits: int = 0) -> int:
    """K per channel: float16 scale and zero of the page, a byte each for a channel. V per token, symmetric: no zero.

    A refined channel of K takes its index (a byte) and the lower bits of 64 tokens.
    """
    codes = 2 * (64 * dim * bits // 8)
    return codes + (2 + 2 + dim + dim) + (2 + 64) + refined * (1 + 64 * refined_bits // 8)


def paper_bytes(dim: int, bits: int) -> int:
    """For K and for V: codes, one float16 tile scale, integer scale and offset of each channel."""
    return 2 * (64 * dim * bits // 8 + 2 + 2 * dim)


def kivi_bytes(dim: int, bits: int) -> int:
    """Pages of 32. K: float16 scale and minimum of each channel. V: of each token and 32 channels."""
    return 2 * (32 * dim * bits // 8) + 4 * dim + 4 * 32 * (dim // 32)


def expected_bytes(name: str, dim: int) -> int:
    match name:
        case "fp16":
            return 64 * dim * 2 * 2
        case "int8":
            return turbo_bytes(dim, 8)
        case "turbo4" | "turbo3":
            return turbo_bytes(dim, int(name[-1]), refined=dim * 3 // 32, refined_bits=1)
        case "turbo2":
            return turbo_bytes(dim, 2, refined=dim // 4, refined_bits=2)
        case "paper4" | "paper3":
            return paper_bytes(dim, 4)
        case _:
            return kivi_bytes(dim, int(name[-1]))


# Bytes of a page that belong to no region, by head dimension: before a region (to a multiple of 64, or of the largest
# power of two in its size) and, as last addend, behind the scales of V (the page to 128, to 16 for paper4 and paper3).
GAPS = {
    "fp16": {64: 0, 80: 0, 96: 0, 128: 0, 256: 0},
    # Before the scales of V alone, which begin at 64 n. D = 64: 8192 + 64 + 64 + 3 x 2 = 8326, 8384 = 131 x 64.
    "int8": {64: 58, 80: 26, 96: 58 + 64, 128: 58, 256: 58},
    # 9 channels and 7 channels: an odd number of bytes, and a float16 behind them. D = 256: 24 numbers at 17092 + 4.
    # The scales of V: D = 64 4284 -> 4288, 80 5350 -> 5376, 96 6424 -> 6464, 128 8562 -> 8576, 256 17122 -> 17152.
    "turbo4": {64: 4, 80: 1 + 26 + 64, 96: 1 + 40, 128: 14 + 64, 256: 4 + 30 + 64},
    "turbo3": {64: 4, 80: 1 + 26 + 64, 96: 1 + 40, 128: 14 + 64, 256: 4 + 30 + 64},
    # Refined codes of 20 channels (320 bytes) at 2720 + 32 = 43 x 64; then numbers of 16, 20, 24, 32 and 64 channels at
    # multiples of 16, 4, 8, 32 and 64: 2436 + 12, 3076, 3652 + 4, 4868 + 28, 9732 + 60.
    "turbo2": {64: 12 + 30, 80: 32 + 38, 96: 4 + 30 + 64, 128: 28 + 62 + 64, 256: 60 + 62},
    # Two float16, then D scales of V at multiples of 64, 16, 32, 64 and 64.
    "paper4": {64: 60, 80: 12, 96: 28, 128: 60, 256: 60},
    "paper3": {64: 60, 80: 12, 96: 28, 128: 60, 256: 60},
    "kivi4": {64: 0, 96: 0, 128: 0, 256: 0},
    "kivi2": {64: 0, 96: 0, 128: 0, 256: 0},
}


def layout_of(name: str, dim: int) -> PageLayout:
    cache = presets()[name].cache
    return PageLayout(cache.page_size, dim, cache.key, cache.value)


CASES = [(name, dim) for name in presets() for dim in DIMS if not (name.startswith("kivi") and dim % 32)]


@pytest.mark.parametrize(("name", "dim"), CASES)
def test_bytes_by_hand(name: str, dim: int):
    layout = layout_of(name, dim)
    used = expected_bytes(name, dim)
    assert sum(region.nbytes for region in layout.regions.values()) == used
    assert layout.nbytes == used + GAPS[name][dim]
    assert layout.nbytes % (128 if name.startswith(("int8", "turbo")) else 16) == 0
    assert layout.bits_per_value == layout.nbytes * 8 / (2 * layout.page_size * dim)


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [("fp16", 32768), ("turbo4", 8704), ("turbo3", 6656), ("turbo2", 5120), ("paper4", 8768), ("kivi4", 5120)],
)
def test_bytes_at_head_dim_128(name: str, nbytes: int):
    """turbo4: codes 2 x 4096, K 256 + 4, 12 refined channels of 8 + 1, V 2 = 8562; to 8576, V 64 = 8640; to 68 x 128.

    turbo2: codes 2 x 2048, K 256, 32 refined channels of 16 = 4864, 4; to 4896, 32 numbers, V 2 = 4930; to 4992, V 64 =
    5056; to 40 x 128. paper4: 8192, K 256, 4 = 8452; to 8512, V 256 = 8768 = 548 x 16. kivi4: 4096 + 512 + 512.
    """
    assert layout_of(name, 128).nbytes == nbytes


@pytest.mark.parametrize(
    ("name", "dim", "offsets"),
    [
        (
            "turbo4",
            128,
            {
                "key_codes": 0,
                "value_codes": 4096,
                "key_scale": 8192,
                "key_zero": 8320,
                "key_refined_codes": 8448,
                "key_page_scale": 8544,
                "key_page_zero": 8546,
                "key_refined_index": 8548,
                "value_page_scale": 8560,
                "value_scale": 8576,
            },
        ),
        (
            "turbo2",
            80,
            {
                "key_codes": 0,
                "value_codes": 1280,
                "key_scale": 2560,
                "key_zero": 2640,
                "key_refined_codes": 2752,
                "key_page_scale": 3072,
                "key_page_zero": 3074,
                "key_refined_index": 3076,
                "value_page_scale": 3096,
                "value_scale": 3136,
            },
        ),
        (
            "paper4",
            64,
            {
                "key_codes": 0,
                "value_codes": 2048,
                "key_scale": 4096,
                "key_zero": 4160,
                "key_page_scale": 4224,
                "value_page_scale": 4226,
                "value_scale": 4288,
                "value_zero": 4352,
            },
        ),
        (
            "kivi4",
            128,
            {
                "key_codes": 0,
                "value_codes": 2048,
                "key_scale": 4096,
                "key_zero": 4352,
                "value_scale": 4608,
                "value_zero": 4864,
            },
        ),
    ],
)
def test_offsets_by_hand(name: str, dim: int, offsets: dict[str, int]):
    assert {region_name: region.offset for region_name, region in layout_of(name, dim).regions.items()} == offsets


@pytest.mark.parametrize(("name", "dim"), CASES)
def test_regions_and_gaps_fill_the_page(name: str, dim: int):
    """Every byte of a page is in one region or in one gap."""
    layout = layout_of(name, dim)
    owners = [0] * layout.nbytes
    for region in layout.regions.values():
        alignment = 64
        while region.nbytes % alignment:
            alignment //= 2
        assert region.offset % alignment == 0
        assert alignment % region.dtype.itemsize == 0
        for byte in range(region.offset, region.offset + region.nbytes):
            owners[byte] += 1
    for start, end in layout.gaps:
        assert start < end
        for byte in range(start, end):
            owners[byte] += 1
    assert owners == [1] * layout.nbytes
    assert sum(end - start for start, end in layout.gaps) == GAPS[name][dim]
    starts = [start for start, _ in layout.gaps]
    assert starts == sorted(starts)


def test_gaps_by_hand():
    """turbo2, 128 channels: before the numbers of the refined channels, before the scales of V, at the end."""
    assert layout_of("turbo2", 128).gaps == ((4868, 4896), (4930, 4992), (5056, 5120))
    assert layout_of("turbo4", 64).gaps == ((4284, 4288),)
    assert layout_of("kivi4", 128).gaps == ()


@pytest.mark.parametrize(("name", "dim"), CASES)
def test_gaps_are_zero(name: str, dim: int):
    layout = layout_of(name, dim)
    key, value = (torch.randn(2, layout.page_size, dim) for _ in range(2))
    pages = encode_pages(layout, key, value, query_power=torch.rand(2, dim))
    for start, end in layout.gaps:
        assert not pages[:, start:end].any()


@pytest.mark.parametrize("bits", (8, 4, 3, 2))
def test_alignment_of_pages(bits: int):
    """128 bytes where kernels read both K and V: two-level metadata, below 16 bits; else 16."""
    two_level, exact = TensorFormat(bits), TensorFormat(16)
    others = [exact, TensorFormat(bits, metadata="float16"), TensorFormat(bits, metadata="flashq")]
    assert PageLayout(64, 80, two_level, two_level).alignment == 128
    assert PageLayout(64, 80, exact, exact).alignment == 16
    for other in others:
        assert PageLayout(64, 80, two_level, other).alignment == 16
        assert PageLayout(64, 80, other, two_level).alignment == 16


@pytest.mark.parametrize(("name", "dim"), CASES)
def test_regions_are_independent(name: str, dim: int):
    """What is written to each region comes back after all others were written, for several pages at once."""
    layout = layout_of(name, dim)
    pages = torch.zeros(2, 3, layout.nbytes, dtype=torch.uint8)
    stored = {}
    for region_name, region in layout.regions.items():
        stored[region_name] = torch.randint(-100, 100, (2, 3, *region.shape)).to(region.dtype)
        layout.write(pages, region_name, stored[region_name])
    for region_name, values in stored.items():
        assert torch.equal(layout.read(pages, region_name), values), region_name
        assert torch.equal(layout.read(pages[1, 2], region_name), values[1, 2]), region_name


@pytest.mark.parametrize(
    ("granularity", "scales"), [(PerToken(), 64), (PerChannel(), 96), (PerGroup(32), 192), (PerBlock(), 1)], ids=repr
)
def test_number_of_scales(granularity: PerToken | PerChannel | PerGroup | PerBlock, scales: int):
    fmt = TensorFormat(4, granularity)
    layout = PageLayout(64, 96, fmt, fmt)
    for side in ("key", "value"):
        assert layout.regions[f"{side}_scale"].shape == (scales,) == layout.regions[f"{side}_zero"].shape


@pytest.mark.parametrize("page_size", (32, 64, 128))
@pytest.mark.parametrize("bits", (8, 4, 3, 2))
def test_code_shapes(bits: int, page_size: int):
    layout = PageLayout(page_size, 80, TensorFormat(bits), TensorFormat(bits))
    assert layout.regions["key_codes"].shape == (page_size, 80 * bits // 8)
    assert layout.regions["value_codes"].shape == (80, page_size * bits // 8)


def test_bad_layouts():
    with pytest.raises(InvalidInputError, match="head_dim: expected one of 64, 80, 96, 128, 256, received 72"):
        PageLayout(64, 72, TensorFormat(4), TensorFormat(4))
    with pytest.raises(InvalidInputError, match="value group size: expected a divisor of head_dim 80, received 32"):
        PageLayout(64, 80, TensorFormat(4), TensorFormat(4, PerGroup(32)))
