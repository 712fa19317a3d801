"""Two-level metadata: rounding of scales and zeros relative to one float16 number of the page."""

import pytest
import torch

from turboattention.errors import InvalidInputError
from turboattention.quant.two_level import expand_scales, expand_zeros, page_maximum, round_scales, round_zeros


def test_page_maximum_is_rounded_up_to_float16():
    exact = torch.tensor([[1.0, 0.25], [1.0001, 0.0], [-2049.0, 3.0], [0.0, 0.0], [1e-9, 0.0]])
    got = page_maximum(exact, "x")
    assert got.dtype == torch.float16
    assert got.flatten().tolist() == [1.0, 1.0 + 2**-10, 2050.0, 0.0, 2**-24]


def test_codes_by_hand():
    page, codes = round_scales(torch.tensor([2.0, 1.0, 0.5, 0.0]), "scale")
    assert page.item() == 2.0
    assert codes.tolist() == [255, 128, 64, 1]
    page, codes = round_zeros(torch.tensor([-2.0, 1.0, 0.0, 2.0]), "zero")
    assert page.item() == 2.0
    assert codes.tolist() == [-127, 64, 0, 127]


@pytest.mark.parametrize("magnitude", (1e4, 1.0, 1e-2, 3e-5, 1e-6))
def test_rounding_stays_within_half_a_step(magnitude: float):
    """Also for scales below the smallest normal float16 (6.1e-5): 8-bit codes of values below 0.0155 have such."""
    exact = magnitude * (0.1 + 0.9 * torch.rand(50, 64))
    page, codes = round_scales(exact, "scale")
    assert ((expand_scales(page, codes) - exact).abs() <= page.float() / 510 * 1.001).all()
    exact = magnitude * (2 * torch.rand(50, 64) - 1)
    page, codes = round_zeros(exact, "zero")
    assert ((expand_zeros(page, codes) - exact).abs() <= page.float() / 254 * 1.001).all()


def test_too_large_for_float16():
    assert page_maximum(torch.tensor([65504.0]), "x").item() == 65504.0
    with pytest.raises(InvalidInputError, match="key range: expected magnitudes up to 65504, received 7e"):
        round_scales(torch.tensor([1.0, 7e4]), "key range")
