"""SAS and base-2 softmax against torch.softmax, hand-computed values and the figures of the paper's notes."""

import math

import pytest
import torch

from turboattention.errors import InvalidInputError
from turboattention.ops.softmax import (
    base2_softmax,
    exp2_poly,
    online_base2,
    sas_exp,
    sas_softmax,
    sas_weights,
    skip_threshold,
)

SIZES = (1, 63, 64, 111)
DTYPES = (torch.float16, torch.float32)
LEVELS = 255


def gaussian(*shape: int, sd: float = 1.0, seed: int = 0) -> torch.Tensor:
    return sd * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- SAS: e^-x ---


def test_sas_exp_by_hand():
    """POLY(0) = 0.9996; POLY(0.5) = -0.0128125 + 0.11565 - 0.4961 + 0.9996 = 0.6063375."""
    x = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.5, 6.0])
    expected = torch.tensor(
        [0.9996, 0.6063375, 0.9996 * 0.36787944, 0.9996 * 0.13533528, 0.6063375 * 0.04978707, 0.9996 * 0.00247875]
    )
    torch.testing.assert_close(sas_exp(x), expected, rtol=2e-6, atol=0)


def test_sas_exp_is_zero_beyond_the_cut():
    just_beyond = torch.nextafter(torch.tensor(6.0), torch.tensor(7.0))
    assert sas_exp(torch.tensor([6.0])).item() > 0
    assert sas_exp(torch.tensor([just_beyond, 6.5, 7.0, 1e30, math.inf])).tolist() == [0.0] * 5


def test_sas_exp_error_is_that_of_the_published_cubic():
    """Absolute 4.0e-4 at 0 and relative 1.03e-3 towards 1, as derived from the published coefficients."""
    x = torch.linspace(0, 6, 600_001)
    exact = (-x.double()).exp()
    error = sas_exp(x).double() - exact
    assert 3.9e-4 < error.abs().max().item() < 4.1e-4
    assert 1.00e-3 < (error / exact).abs().max().item() < 1.04e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sas_softmax_against_torch(size: int, dtype: torch.dtype):
    """No score lies below the cut here, so what remains is twice the cubic's 1.03e-3 and the rounding of the dtype."""
    scores = gaussian(3, 5, size).clamp(-2.9, 2.9).to(dtype)
    got = sas_softmax(scores)
    exact = torch.softmax(scores.double(), -1)
    assert got.dtype == dtype
    assert got.shape == scores.shape
    rounding = 0.0 if dtype == torch.float32 else 2.0**-11
    assert ((got.double() - exact) / exact).abs().max().item() < 1.3e-3 + rounding
    torch.testing.assert_close(got.double().sum(-1), torch.ones(3, 5).double(), atol=2e-6 + 10 * rounding, rtol=0)


def test_sas_softmax_along_another_dimension():
    scores = gaussian(4, 7, 3)
    torch.testing.assert_close(sas_softmax(scores, 1), sas_softmax(scores.transpose(1, 2)).transpose(1, 2))


def test_sas_one_element_weighs_one():
    assert sas_softmax(torch.tensor([[3.25], [-1e4]])).tolist() == [[1.0], [1.0]]


def test_sas_ties_share_equally():
    assert sas_softmax(torch.full((2, 4), -7.0)).tolist() == [[0.25] * 4] * 2
    got = sas_softmax(torch.tensor([[1.0, 1.0, -9.0]]))
    assert got.tolist() == [[0.5, 0.5, 0.0]]


def test_sas_masked_scores_and_rows():
    scores = torch.tensor([[0.0, -math.inf, 0.0], [-math.inf, -math.inf, -math.inf]])
    assert sas_softmax(scores).tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    weights, maximum, total = sas_weights(scores)
    assert maximum.flatten().tolist() == [0.0, -math.inf]
    assert total[1].item() == 0.0
    assert weights[1].tolist() == [0.0] * 3


def test_sas_weights_tile_by_tile():
    """Two tiles merged with the running maximum give the sums of one pass, to the error of the cubic."""
    scores = gaussian(6, 96, sd=2.0)
    _, m1, l1 = sas_weights(scores[:, :64])
    second = sas_weights(scores[:, 64:], lower_bound=m1)
    merged = l1 * sas_exp(second.maximum - m1) + second.total
    whole = sas_weights(scores)
    assert torch.equal(second.maximum, whole.maximum)
    torch.testing.assert_close(merged, whole.total, rtol=2e-2, atol=0)  # the cut acts relative to each running maximum
    one_row = sas_weights(torch.tensor([[-2.0]]), lower_bound=torch.tensor([[0.0]]))
    torch.testing.assert_close(one_row.weights, torch.tensor([[0.9996 * math.exp(-2)]]), rtol=1e-6, atol=0)


def test_mass_lost_below_the_cut():
    """One row of the table in README.md: i.i.d. Gaussian scores, N = 8192, cut at -6, lose 0.129 at sd = 2."""
    expected = {1.0: 0.002, 2.0: 0.129, 3.0: 0.126, 4.0: 0.070}
    for sd, mass in expected.items():
        scores = gaussian(600, 8192, sd=sd, seed=int(sd))
        shifted = scores - scores.amax(-1, keepdim=True)
        exact = torch.softmax(scores, -1)
        lost = torch.where(shifted < -6, exact, 0.0).sum(-1).mean().item()
        assert lost == pytest.approx(mass, abs=0.008 if sd > 1 else 0.0015), sd
        missing = 1 - (sas_weights(scores).total.squeeze(-1) / shifted.exp().sum(-1)).mean().item()
        assert missing == pytest.approx(lost, abs=5e-4), sd


def test_mass_below_half_a_level_is_as_large_as_the_cut():
    """255 levels end at e^-6.23: with one scale for a row they lose what the cut at -6 loses; 16 bits do not."""
    scores = gaussian(100, 8192, sd=2.0, seed=5)
    exact = torch.softmax(scores, -1)

    def variation(weights: torch.Tensor) -> float:
        return 0.5 * (weights - exact).abs().sum(-1).mean().item()

    assert variation(sas_softmax(scores)) == pytest.approx(0.127, abs=0.01)
    assert variation(base2_softmax(scores).weights) == pytest.approx(0.081, abs=0.01)
    assert variation(base2_softmax(scores, probability_levels=65535).weights) < 1e-3
    assert variation(base2_softmax(scores, probability_levels=None).weights) < 1e-4


# --- base 2: 2^x ---


def test_exp2_poly_error():
    x = -torch.linspace(0, 126, 2_000_001)
    exact = torch.exp2(x.double())
    assert ((exp2_poly(x).double() - exact) / exact).abs().max().item() < 8.7e-5


def test_exp2_poly_is_exact_at_integers():
    x = -torch.arange(0.0, 127.0)
    assert torch.equal(exp2_poly(x).double(), torch.exp2(x.double()))


def test_exp2_poly_by_hand_at_a_half():
    """2^-0.5: floor -1, fraction 0.5, half of 1 + 0.3475586475 + 0.05691088375 + 0.009633503875."""
    assert exp2_poly(torch.tensor([-0.5])).item() == pytest.approx(0.7070515175625, rel=2e-7)


def test_exp2_poly_far_below():
    x = torch.tensor([-126.5, -127.0, -1e30, -math.inf])
    assert exp2_poly(x).tolist() == [0.0] * 4


def test_exp2_poly_never_decreases():
    x = torch.linspace(-20, 0, 1_000_001)
    y = exp2_poly(x).double()
    assert ((y[1:] - y[:-1]) / y[1:]).min().item() > -2.5e-7


@pytest.mark.parametrize("levels", (15, 119, 127, 255))
def test_everything_below_the_skip_threshold_rounds_to_zero(levels: int):
    """Every float32 within 4096 steps of the threshold, and a coarse sweep below."""
    threshold = torch.tensor(skip_threshold(levels))
    near = (threshold.view(torch.int32) + torch.arange(4096, dtype=torch.int32)).view(torch.float32)
    below = torch.cat([near, torch.linspace(-126, threshold.item(), 500_001)])
    assert below.max().item() <= threshold.item()
    assert (levels * exp2_poly(below)).round().max().item() == 0.0


# --- base 2: softmax over tiles ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tile", (1, 16, 64))
def test_base2_against_torch(size: int, dtype: torch.dtype, tile: int):
    """A weight is off by half a level, and the row sum by at most half a level for each key."""
    scores = gaussian(2, 3, size, sd=2.0).to(dtype)
    exact = torch.softmax(scores.double(), -1)
    error = (base2_softmax(scores, tile).weights.double() - exact).abs()
    largest = exact.amax(-1, keepdim=True)
    total = 1 / largest  # the row sum when the maximum weighs 1
    half = 0.5 / LEVELS + 2e-4  # a level and two cubics
    bound = (half + exact / largest * half * size / total) / (total - half * size).clamp_min(1)
    assert (error <= bound).all(), (error / bound).max()
    torch.testing.assert_close(base2_softmax(scores, tile).weights.sum(-1), torch.ones(2, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_base2_without_rounding_of_probabilities(size: int):
    scores = gaussian(2, 3, size, sd=2.0)
    exact = torch.softmax(scores.double(), -1)
    got = base2_softmax(scores, probability_levels=None).weights.double()
    assert ((got - exact) / exact).abs().max().item() < 2e-4


def test_base2_ties_by_hand():
    """Scores ln 2 apart are one step of base 2: integers 255, 255, 128 (127.5 to even); -20 rounds to 0."""
    ln2 = math.log(2.0)
    got = base2_softmax(torch.tensor([[5.0, 5.0, 5.0 - ln2, -20.0]], dtype=torch.float64).float()).weights
    torch.testing.assert_close(got, torch.tensor([[255.0, 255.0, 128.0, 0.0]]) / 638, rtol=1e-2, atol=0)
    integers = (got * 638).round()
    assert integers[0, :2].tolist() == [255.0, 255.0]
    assert integers[0, 2].item() in (127.0, 128.0)


def test_row_maximum_weighs_exactly_all_levels():
    scores = gaussian(50, 100, sd=30.0)
    weights = base2_softmax(scores, tile=100).weights
    top = weights.amax(-1, keepdim=True)
    integers = weights / top * LEVELS
    torch.testing.assert_close(integers, integers.round(), atol=1e-4, rtol=0)


def test_base2_masked_rows():
    scores = gaussian(2, 4, 111)
    scores[..., 70:] = -math.inf
    scores[:, 1] = -math.inf
    scores[:, 2, :64] = -math.inf  # starts with a tile that is masked entirely
    weights = base2_softmax(scores).weights
    assert torch.isfinite(weights).all()
    assert (weights[:, 1] == 0).all()
    assert (weights[..., 70:] == 0).all()
    assert (weights[:, 2, :64] == 0).all()
    torch.testing.assert_close(weights.sum(-1)[:, [0, 2, 3]], torch.ones(2, 3), atol=1e-6, rtol=0)
    attention = online_base2(scores, gaussian(2, 111, 8))
    assert (attention.output[:, 1] == 0).all()
    assert (attention.lse[:, 1] == -math.inf).all()
    assert torch.isfinite(attention.output).all()


def test_base2_nothing_but_masked():
    result = base2_softmax(torch.full((2, 3, 130), -math.inf))
    assert result.weights.count_nonzero() == 0
    assert result.skipped == 2 * 3


def test_base2_one_element():
    assert base2_softmax(torch.tensor([[-1234.5]])).weights.tolist() == [[1.0]]
    got = online_base2(torch.tensor([[2.5]]), torch.tensor([[1.0, -3.0]]))
    assert got.output.tolist() == [[1.0, -3.0]]
    assert got.lse.item() == pytest.approx(2.5, abs=1e-6)
    assert got.skipped == 0


@pytest.mark.parametrize("levels", (127, 255, None))
@pytest.mark.parametrize("shape", ((1, 1, 640), (2, 5, 511), (3, 1, 100)))
@pytest.mark.parametrize("sd", (1.0, 6.0, 60.0))
def test_skipping_changes_no_bit(shape: tuple[int, int, int], sd: float, levels: int | None):
    scores = gaussian(*shape, sd=sd, seed=3)
    scores[..., 0] += 40.0 if sd > 1 else 0.0  # a sink: later tiles become negligible
    values = gaussian(shape[0], shape[2], 16, seed=4)
    with_skip, without = base2_softmax(scores, 32, levels), base2_softmax(scores, 32, levels, skip=False)
    assert torch.equal(with_skip.weights, without.weights)
    assert without.skipped == 0
    a, b = online_base2(scores, values, 32, levels), online_base2(scores, values, 32, levels, skip=False)
    assert torch.equal(a.output, b.output)
    assert torch.equal(a.lse, b.lse)
    assert a.skipped == with_skip.skipped
    assert b.skipped == 0
    if sd == 6.0 and levels is not None:
        assert a.skipped > 0


def test_skipped_tiles_by_hand():
    """Tiles of 4 with maxima 0, -6.25, -6.1, 1, -5.2: 0.5 / 255 is e^-6.234, relative to the running maximum."""
    largest = [0.0, -6.25, -6.1, 1.0, -5.2]
    scores = torch.full((1, 20), -9.0)
    scores[0, ::4] = torch.tensor(largest)
    assert base2_softmax(scores, 4).skipped == 1  # only -6.25; -5.2 - 1 = -6.2 is still half a level
    scores[0, 16] = -5.25
    assert base2_softmax(scores, 4).skipped == 2
    assert base2_softmax(scores.expand(2, 3, 20), 4).skipped == 4  # counted for each leading index


def test_one_row_keeps_a_tile_alive():
    scores = torch.zeros(2, 128)
    scores[:, 64:] = -30.0
    assert base2_softmax(scores).skipped == 1
    scores[1, 100] = -1.0
    assert base2_softmax(scores).skipped == 0


def test_skipped_tile_is_not_computed():
    """NaN in the values of a skipped tile can't reach the output, because they are not read."""
    scores = torch.zeros(1, 128)
    scores[:, 64:] = -30.0
    values = torch.ones(128, 4)
    values[64:] = math.nan
    assert online_base2(scores, values).output.tolist() == [[1.0] * 4]
    assert online_base2(scores, values, skip=False).output.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (1, 63, 111, 300))
def test_online_against_float64(size: int, dtype: torch.dtype):
    scores, values = gaussian(2, 3, 7, size, sd=2.0).to(dtype), gaussian(2, 3, size, 64, seed=1).to(dtype)
    got = online_base2(scores, values)
    exact = torch.softmax(scores.double(), -1) @ values.double()
    assert got.output.shape == (2, 3, 7, 64)
    assert got.lse.shape == (2, 3, 7)
    # Measured 0, 0.012, 0.014, 0.020: the sum over all keys of half-level errors.
    bound = {1: 1e-6, 63: 0.015, 111: 0.018, 300: 0.025}[size]
    assert ((got.output.double() - exact).norm() / exact.norm()).item() < bound
    unrounded = online_base2(scores, values, probability_levels=None)
    assert ((unrounded.output.double() - exact).norm() / exact.norm()).item() < 1e-4
    lse = torch.logsumexp(scores.double(), -1)
    assert (unrounded.lse.double() - lse).abs().max().item() < 1e-4
    assert (got.lse.double() - lse).abs().max().item() < 4e-2  # natural-log units


def test_online_equals_weights_times_values():
    scores, values = gaussian(2, 5, 200, sd=3.0), gaussian(2, 200, 16, seed=9)
    torch.testing.assert_close(
        online_base2(scores, values).output, base2_softmax(scores).weights @ values, rtol=1e-5, atol=1e-6
    )


def test_online_broadcasts_values():
    scores, values = gaussian(3, 2, 70), gaussian(70, 8, seed=2)
    torch.testing.assert_close(online_base2(scores, values).output[1], online_base2(scores[1], values).output)


def test_bad_arguments():
    with pytest.raises(InvalidInputError, match="values: expected 5 keys"):
        online_base2(torch.zeros(1, 5), torch.zeros(4, 2))
    with pytest.raises(InvalidInputError, match="tile: expected"):
        base2_softmax(torch.zeros(1, 5), tile=0)
    with pytest.raises(InvalidInputError, match="probability_levels: expected"):
        base2_softmax(torch.zeros(1, 5), probability_levels=0)
    with pytest.raises(InvalidInputError, match="scores: expected at least 2"):
        base2_softmax(torch.zeros(5))
