"""Affine quantisation against a slow loop, ties by hand, constants and extremes."""

import pytest
import torch

from turboattention.quant.affine import SEARCH_SHARES, dequantize, divided, encode, quantize, search_range, ungroup
from turboattention.quant.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerToken

BITS = (8, 4, 3, 2)
GRANULARITIES = (PerToken(), PerChannel(), PerGroup(8), PerBlock())


def members(granularity: Granularity, tokens: int, channels: int) -> list[list[tuple[int, int]]]:
    """Index lists of the values that share a scale."""
    match granularity:
        case PerToken():
            return [[(t, c) for c in range(channels)] for t in range(tokens)]
        case PerChannel():
            return [[(t, c) for t in range(tokens)] for c in range(channels)]
        case PerGroup(size):
            starts = range(0, channels, size)
            return [[(t, c) for c in range(s, s + size)] for t in range(tokens) for s in starts]
        case PerBlock():
            return [[(t, c) for t in range(tokens) for c in range(channels)]]


def restored(x: torch.Tensor, bits: int, granularity: Granularity, **options: bool) -> torch.Tensor:
    return ungroup(dequantize(*quantize(x, bits, granularity, **options)), granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("bits", BITS)
def test_against_loop(bits: int, symmetric: bool, granularity: Granularity):
    x = 3 * torch.randn(7, 16) + 1
    got = quantize(x, bits, granularity, symmetric=symmetric)
    codes, top = ungroup(got.codes, granularity), 2**bits - 1
    again = ungroup(dequantize(*got), granularity)
    for group in members(granularity, 7, 16):
        numbers = [x[i] for i in group]
        low, high = min(numbers), max(numbers)
        if symmetric:
            high = max(abs(low), abs(high))
            low = -high
        scale = (high - low) / top
        for i in group:
            # Python's round takes ties to the even number, too.
            assert codes[i].item() == min(max(round(((x[i] - low) / scale).item()), 0), top)
            assert again[i].item() == pytest.approx((codes[i] * scale + low).item(), abs=1e-5)
            assert (again[i] - x[i]).abs() <= scale / 2 + 1e-5


def test_ties_go_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, 13.5, 14.5, -0.5, 15.5])
    codes = encode(x, torch.tensor(1.0), torch.tensor(0.0), 4)
    assert codes.tolist() == [0, 2, 2, 4, 14, 14, 0, 15]  # -0.5 and 15.5 (to 16) end at the ends of the grid
    codes = encode(x[:4], torch.tensor(1.0), torch.tensor(-1.0), 2)
    assert codes.tolist() == [2, 2, 3, 3]  # 1.5, 2.5, 3.5, 4.5


@pytest.mark.parametrize("bits", BITS)
def test_every_tie_of_a_grid(bits: int):
    halves = torch.arange(2**bits - 1) + 0.5
    assert encode(halves, torch.tensor(1.0), torch.tensor(0.0), bits).tolist() == [
        k if k % 2 == 0 else k + 1 for k in range(2**bits - 1)
    ]


def test_values_outside_the_grid_take_its_ends():
    codes = encode(torch.tensor([-1e30, -5.0, 99.0, 1e30]), torch.tensor(1.0), torch.tensor(0.0), 3)
    assert codes.tolist() == [0, 0, 7, 7]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("constant", (0.0, 2.5, -1e4))
@pytest.mark.parametrize("search", (False, True))
def test_constants_come_back_exactly(search: bool, constant: float, granularity: Granularity):
    x = torch.full((4, 16), constant)
    assert torch.equal(restored(x, 4, granularity, search=search), x)


@pytest.mark.parametrize("constant", (2.5, -2.5))
def test_symmetric_constants_are_an_end_of_the_grid(constant: float):
    torch.testing.assert_close(
        restored(torch.full((4, 16), constant), 4, PerToken(), symmetric=True), torch.full((4, 16), constant)
    )


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("magnitude", (6e4, 1e-6))
def test_extreme_magnitudes(magnitude: float, bits: int, granularity: Granularity):
    x = magnitude * (torch.rand(8, 16) * 2 - 1)
    x[0, 0], x[-1, -1] = magnitude, -magnitude
    error = (restored(x, bits, granularity) - x).abs().max().item()
    assert error <= 2 * magnitude / (2**bits - 1) / 2 * 1.001


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("bits", BITS)
def test_search_is_never_worse_and_helps_with_outliers(bits: int, granularity: Granularity):
    x = torch.randn(64, 64)
    x[::16, ::16] *= 4

    def squared(search: bool) -> float:
        return (restored(x, bits, granularity, search=search) - x).square().sum().item()

    assert squared(True) <= squared(False) * (1 + 1e-6)
    if bits <= 3:
        assert squared(True) < 0.95 * squared(False)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype):
    x = torch.randn(8, 16).to(dtype)
    for a, b in zip(quantize(x, 4, PerChannel()), quantize(x.float(), 4, PerChannel()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bits", BITS)
def test_search_against_a_loop(bits: int):
    """Squared errors in units of (half range / 4096) ** 2, cut to integers, added; the first least one wins."""
    x = torch.randn(48, 6) ** 3
    low, high = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
    got_low, got_high = search_range(x, low, high, (-2,), bits)
    top = 2**bits - 1
    for c in range(6):
        middle, half = (low[0, c] + high[0, c]) * 0.5, (high[0, c] - low[0, c]) * 0.5
        relative = (x[:, c] - middle) * (1 / half)
        errors = []
        for share in SEARCH_SHARES:
            total = 0
            for r in relative:
                position = r * (top / (2 * share)) + top / 2
                nearest = min(max(round(position.item()), 0), top)
                total += int(((position - nearest) * (2 * share / top * 4096)).square().item())
            errors.append(total)
        share = SEARCH_SHARES[errors.index(min(errors))]
        assert got_low[0, c] == middle - share * half
        assert got_high[0, c] == middle + share * half


@pytest.mark.parametrize("bits", BITS)
def test_search_does_not_depend_on_the_order_of_values(bits: int):
    x = torch.randn(128, 32) ** 3
    low, high = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
    first = search_range(x, low, high, (-2,), bits)
    for _ in range(5):
        again = search_range(x[torch.randperm(128)], low, high, (-2,), bits)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_search_shares_are_float32_numbers():
    """As Python numbers they would be rounded differently in a kernel, which knows float32 alone."""
    assert [float(torch.tensor(share, dtype=torch.float32)) for share in SEARCH_SHARES] == list(SEARCH_SHARES)
    for share, twentieths in zip(SEARCH_SHARES, range(20, 11, -1), strict=True):
        assert share == pytest.approx(twentieths / 20, rel=1e-6)


@pytest.mark.parametrize("number", (3, 7, 127, 255))
def test_division_rounds_once(number: int):
    x = torch.randn(1000)
    assert torch.equal(divided(x, number), (x.double() / number).float())
