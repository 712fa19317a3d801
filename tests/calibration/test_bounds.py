"""The bound holds for every query of hard data, and is not empty."""

import pytest
import torch

from turboattention.calibration.bounds import head_bound
from turboattention.calibration.capture import Captured
from turboattention.calibration.levels import levels


def captured(outlier: float, sharpness: float) -> Captured:
    key = torch.randn(1, 2, 320, 64)
    key[..., 3] += outlier
    value = torch.randn(1, 2, 320, 64) * torch.rand(320, 1).exp()
    return Captured(torch.randn(1, 4, 320, 64) * sharpness, key, value, 0.125)


@pytest.mark.parametrize("pair", [("2", "2"), ("2+2x18", "2"), ("3+1x6", "3"), ("4", "4"), ("8", "8")])
@pytest.mark.parametrize(("outlier", "sharpness"), [(0.0, 1.0), (40.0, 1.0), (5.0, 6.0), (0.0, 0.0)])
def test_the_bound_holds(pair: tuple[str, str], outlier: float, sharpness: float) -> None:
    formats = levels("key", 64)[pair[0]], levels("value", 64)[pair[1]]
    for head in range(2):
        found = head_bound(captured(outlier, sharpness), head, *formats)
        assert 0 < found.seen <= found.bound
        assert found.excess <= 0.0


def test_more_bits_have_smaller_bounds() -> None:
    data = captured(2.0, 1.0)
    # At 2 and 3 bits ranges are searched: what lies outside of them dominates both bounds.
    three, four, eight = (
        head_bound(data, 0, levels("key", 64)[x], levels("value", 64)[x]).bound for x in ("3", "4", "8")
    )
    assert three > four > eight
