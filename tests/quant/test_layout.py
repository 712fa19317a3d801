"""Bytes of a page against sums written out by hand, for every preset and head dimension."""

import pytest
import torch

from turboattention.config import TensorFormat, presets
from turboattention.errors import InvalidInputError
from turboattention.quant.granularity import PerBlock, PerChannel, PerGroup, PerToken
from turboattention.quant.layout import PAGE_ALIGNMENT, PageLayout

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


def layout_of(name: str, dim: int) -> PageLayout:
    cache = presets()[name].cache
    return PageLayout(cache.page_size, dim, cache.key, cache.value)


CASES = [(name, dim) for name in presets() for dim in DIMS if not (name.startswith("kivi") and dim % 32)]


@pytest.mark.parametrize(("name", "dim"), CASES)
def test_bytes_by_hand(name: str, dim: int):
    layout = layout_of(name, dim)
    used = expected_bytes(name, dim)
    assert sum(region.nbytes for region in layout.regions.values()) == used
    assert layout.nbytes == (used + 15) // 16 * 16
    assert layout.bits_per_value == layout.nbytes * 8 / (2 * layout.page_size * dim)


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [("fp16", 32768), ("turbo4", 8640), ("turbo3", 6592), ("turbo2", 4976), ("paper4", 8720), ("kivi4", 5120)],
)
def test_bytes_at_head_dim_128(name: str, nbytes: int):
    """turbo4: codes 2 x 4096, K 4 + 256, V 2 + 64, 12 refined channels of 1 + 8 = 8626, padded to 8640.

    turbo2: codes 2 x 2048, the same 326, 32 refined channels of 1 + 16 = 4966, padded to 4976. kivi4: 4096 + 512 + 512.
    """
    assert layout_of(name, 128).nbytes == nbytes


@pytest.mark.parametrize(("name", "dim"), CASES)
def test_regions_fill_the_page(name: str, dim: int):
    layout = layout_of(name, dim)
    owner = [0] * layout.nbytes
    for region in layout.regions.values():
        assert region.offset % region.dtype.itemsize == 0
        for byte in range(region.offset, region.offset + region.nbytes):
            owner[byte] += 1
    used = sum(owner)
    assert owner[:used] == [1] * used
    assert owner[used:] == [0] * (layout.nbytes - used)
    assert layout.nbytes % PAGE_ALIGNMENT == 0
    assert layout.nbytes - used < PAGE_ALIGNMENT
    for side in ("key", "value"):
        assert layout.regions[f"{side}_codes"].offset % PAGE_ALIGNMENT == 0


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
