"""FlashQ and head priority against small examples computed here in numpy from the paper's description."""

import numpy as np
import pytest
import torch

from turboattention.config import TensorFormat
from turboattention.quant.codec import encode_pages, expand_pages
from turboattention.quant.granularity import PerChannel
from turboattention.quant.layout import PageLayout
from turboattention.quant.progressive import (
    Stage2,
    expand_stage2,
    head_priority,
    low_priority_heads,
    quantize_stage1,
    quantize_stage2,
    quantize_with_scale,
)


def paper_stage1(x: np.ndarray) -> tuple[np.ndarray, float]:
    """One scale for the tile, max|x| / 119 (kept in float16), codes rounded."""
    scale = float(np.float16(np.float32(np.abs(x).max()) / np.float32(119)))
    return np.clip(np.rint(x.astype(np.float32) / np.float32(scale)), -119, 119).astype(np.int64), scale


def paper_stage2(tile: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per channel, in integers: offset = minimum, scale large enough that the maximum has a code."""
    top = 2**bits - 1
    offset = tile.min(0)
    scale = np.maximum(1, -(-(tile.max(0) - offset) // top))
    return np.minimum(np.rint((tile - offset) / scale).astype(np.int64), top), scale, offset


def paper_restored(x: np.ndarray, bits: int) -> np.ndarray:
    tile, unit = paper_stage1(x)
    codes, scale, offset = paper_stage2(tile, bits)
    return (codes * scale + offset) * unit


def outlier_tile(tokens: int = 64, channels: int = 64) -> np.ndarray:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(tokens, channels)).astype(np.float32)
    x[:, 5] = x[:, 5] * 0.5 + 12
    return x


def test_stage1_by_hand():
    """max 2.38, scale 0.02 (float16: 0.0200043): 1 -> 49.99 -> 50, -0.5 -> -24.99 -> -25."""
    got = quantize_stage1(torch.tensor([[1.0, -0.5], [2.38, 0.0]]))
    assert got.scale.dtype == torch.float16
    assert got.scale.item() == pytest.approx(0.02, rel=5e-4)
    assert got.codes.dtype == torch.int8
    assert got.codes.tolist() == [[50, -25], [119, 0]]


def test_stage1_against_numpy():
    x = outlier_tile()
    codes, scale = paper_stage1(x)
    got = quantize_stage1(torch.from_numpy(x))
    assert got.scale.item() == scale
    assert got.codes.tolist() == codes.tolist()


def test_stage1_of_zeros():
    got = quantize_stage1(torch.zeros(2, 64, 8))
    assert got.codes.count_nonzero() == 0
    assert got.scale.count_nonzero() == 0


def test_tiles_do_not_share_a_scale():
    got = quantize_stage1(torch.tensor([[[1.0]], [[100.0]]]))
    assert got.codes.flatten().tolist() == [119, 119]
    assert got.scale.shape == (2, 1, 1)


def test_universal_scale_clamps():
    codes = quantize_with_scale(torch.tensor([0.5, 1.5, 118.6, 119.4, 500.0, -500.0]), torch.tensor(1.0))
    assert codes.tolist() == [0, 2, 119, 119, 119, -119]  # ties to even, then clamped


def test_stage2_by_hand():
    """Two bits. Channel 0: -10 .. 20, scale 10. Channel 1: 0 .. 7, scale 3. Channel 2: constant, scale 1."""
    tile = torch.tensor([[-10, 0, 5], [20, 7, 5], [1, 4, 5], [-5, 2, 5]], dtype=torch.int8)
    got = quantize_stage2(tile, 2)
    assert got.offset.tolist() == [[-10, 0, 5]]
    assert got.scale.tolist() == [[10, 3, 1]]
    # (1 + 10) / 10 = 1.1; (-5 + 10) / 10 = 0.5, a tie, to 0; 7 / 3 = 2.33; 4 / 3 = 1.33; 2 / 3 = 0.67.
    assert got.codes.tolist() == [[0, 0, 0], [3, 2, 0], [1, 1, 0], [0, 1, 0]]
    assert expand_stage2(got).tolist() == [[-10, 0, 5], [20, 6, 5], [0, 3, 5], [-10, 3, 5]]


@pytest.mark.parametrize("bits", (4, 3, 2))
def test_stage2_against_numpy(bits: int):
    tile, _ = paper_stage1(outlier_tile())
    codes, scale, offset = paper_stage2(tile, bits)
    got = quantize_stage2(torch.from_numpy(tile).to(torch.int8), bits)
    assert got.codes.tolist() == codes.tolist()
    assert got.scale[0].tolist() == scale.tolist()
    assert got.offset[0].tolist() == offset.tolist()
    assert expand_stage2(got).tolist() == (codes * scale + offset).tolist()


@pytest.mark.parametrize("bits", (4, 3, 2))
def test_reexpansion_never_leaves_int8(bits: int):
    """Every minimum and maximum of a channel with every value between them, in integers wider than INT8."""
    for low in range(-119, 120):
        highs = torch.arange(low, 120)
        tile = torch.minimum(torch.arange(low, 120)[:, None], highs[None])  # channel h: low .. h
        got = quantize_stage2(tile.to(torch.int8), bits)
        wide = got.codes.int() * got.scale.int() + got.offset.int()
        assert wide.min().item() >= -127
        assert wide.max().item() <= 127
        assert (wide - tile).abs().max(0).values.le(got.scale[0].int() / 2).all()
        assert torch.equal(expand_stage2(got).int(), wide)


@pytest.mark.parametrize("bits", (4, 2))
def test_pages_hold_the_paper_values(bits: int):
    fmt = TensorFormat(bits, PerChannel(), metadata="flashq")
    layout = PageLayout(64, 64, fmt, fmt)
    key, value = outlier_tile(), outlier_tile()[::-1].copy() * 0.1
    got = expand_pages(layout, encode_pages(layout, torch.from_numpy(key), torch.from_numpy(value)))
    for restored, x in zip(got, (key, value), strict=True):
        np.testing.assert_allclose(restored.numpy(), paper_restored(x, bits), rtol=1e-6, atol=1e-7)


def test_stage2_metadata_types():
    got = quantize_stage2(torch.tensor([[-119], [119]], dtype=torch.int8), 2)
    assert isinstance(got, Stage2)
    assert (got.codes.dtype, got.scale.dtype, got.offset.dtype) == (torch.uint8, torch.uint8, torch.int8)
    assert got.scale.item() == 80
    assert expand_stage2(got).flatten().tolist() == [-119, 121]


# --- head-wise bits ---


def paper_priority(x: np.ndarray) -> np.ndarray:
    """Gap (range of the head) times the standard deviation of its channel ranges; heads [heads, tokens, channels]."""
    out = []
    for head in x.astype(np.float64):
        ranges = np.array([channel.max() - channel.min() for channel in head.T])
        out.append((head.max() - head.min()) * np.sqrt(((ranges - ranges.mean()) ** 2).mean()))
    return np.array(out)


def test_priority_by_hand():
    """Head 0: channel ranges 2 and 4 (deviation 1), values -1 .. 3: gap 4. Head 1: equal ranges, priority 0."""
    heads = torch.tensor([[[1.0, 3.0], [-1.0, -1.0]], [[5.0, 0.0], [-5.0, 10.0]]])
    assert head_priority(heads[None]).tolist() == [4.0, 0.0]


def test_priority_against_numpy():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 4, 64, 16)) * np.array([1.0, 3.0, 0.5, 2.0])[:, None, None]
    x[:, 2, :, 7] *= 9
    expected = np.mean([paper_priority(row) for row in x], axis=0)
    np.testing.assert_allclose(head_priority(torch.from_numpy(x)).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("priority", "share", "expected"),
    [
        ([5.0, 1.0, 3.0, 2.0], 0.5, [1, 3]),
        ([5.0, 1.0, 3.0, 2.0], 0.0, []),
        ([5.0, 1.0, 3.0, 2.0], 1.0, [0, 1, 2, 3]),
        ([3.0, 2.0, 1.0], 0.5, [2]),
        ([1.0], 0.5, []),
        ([2.0, 2.0, 2.0, 2.0], 0.5, [0, 1]),
    ],
    ids=["half", "none", "all", "odd", "one", "ties"],
)
def test_lowest_heads_are_chosen(priority: list[float], share: float, expected: list[int]):
    assert low_priority_heads(torch.tensor(priority), share) == expected


@pytest.mark.gpu
def test_codes_of_a_gpu_are_those_of_the_cpu():
    """Found by fuzzing on an H200: torch on CUDA multiplies by 1 / 119 and 1 / 15, which is not the quotient."""
    x = torch.randn(64, 64, 32, generator=torch.Generator().manual_seed(0)).half()
    here, there = quantize_stage1(x), quantize_stage1(x.cuda())
    assert torch.equal(here.scale, there.scale.cpu())
    assert torch.equal(here.codes, there.codes.cpu())
    for bits in (2, 3, 4):
        for a, b in zip(quantize_stage2(here.codes, bits), quantize_stage2(there.codes, bits), strict=True):
            assert torch.equal(a, b.cpu())
