"""Error measures against numbers computed by hand."""

import math

import pytest
import torch

from turboattention.quant.error import max_error, relative_rms, sqnr_db


def test_by_hand():
    exact, approximation = torch.tensor([3.0, -4.0]), torch.tensor([3.3, -4.4])
    assert relative_rms(approximation, exact) == pytest.approx(0.1, rel=1e-6)  # |(0.3, -0.4)| / |(3, -4)| = 0.5 / 5
    assert sqnr_db(approximation, exact) == pytest.approx(20.0, abs=1e-5)
    assert max_error(approximation, exact) == pytest.approx(0.4, rel=1e-6)


def test_twice_the_error_is_six_decibels_less():
    exact, error = torch.randn(100), torch.randn(100)
    difference = sqnr_db(exact + 0.01 * error, exact) - sqnr_db(exact + 0.02 * error, exact)
    assert difference == pytest.approx(20 * math.log10(2), abs=1e-3)


def test_without_error():
    x = torch.randn(10)
    assert relative_rms(x, x) == 0.0
    assert sqnr_db(x, x) == math.inf
    assert max_error(x, x) == 0.0


def test_zeros_and_nothing():
    zero = torch.zeros(4)
    assert relative_rms(zero, zero) == 0.0
    assert sqnr_db(zero, zero) == math.inf
    assert relative_rms(torch.ones(4), zero) == math.inf
    assert sqnr_db(torch.ones(4), zero) == -math.inf
    assert max_error(torch.empty(0), torch.empty(0)) == 0.0


def test_half_precision_does_not_overflow():
    assert max_error(torch.tensor([6e4]).half(), torch.tensor([-6e4]).half()) == 2 * torch.tensor(6e4).half().item()
