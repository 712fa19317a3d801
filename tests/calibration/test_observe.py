"""Statistics over batches are those over everything at once."""

import pytest
import torch

from turboattention.calibration.observe import LayerStatistics, RunningStatistics
from turboattention.errors import InvalidInputError
from turboattention.quant.progressive import head_priority


def test_batches_merge_exactly() -> None:
    x = torch.randn(2, 3, 500, 64) * 3 + torch.randn(3, 1, 64)
    seen = RunningStatistics.empty(3, 64)
    for part in x.split([1, 130, 0, 369], dim=2):
        seen.update(part)
    flat = x.double().transpose(0, 1).flatten(1, 2)
    assert seen.count == 1000
    torch.testing.assert_close(seen.mean, flat.mean(1))
    torch.testing.assert_close(seen.std, flat.std(1, correction=0))
    assert torch.equal(seen.low, flat.amin(1))
    assert torch.equal(seen.high, flat.amax(1))


def test_a_large_mean_does_not_hide_a_small_deviation() -> None:
    x = 1e4 + torch.randn(1, 1, 4096, 64, dtype=torch.float64)
    seen = RunningStatistics.empty(1, 64)
    for part in x.split(64, dim=2):
        seen.update(part)
    torch.testing.assert_close(seen.std, x[0].std(1, correction=0), rtol=1e-6, atol=0)


def test_priority_is_the_papers() -> None:
    x = torch.randn(1, 3, 100, 64)
    seen = RunningStatistics.empty(3, 64)
    seen.update(x[:, :, :40])
    seen.update(x[:, :, 40:])
    torch.testing.assert_close(seen.priority.float(), head_priority(x))


def test_plain_data_and_back() -> None:
    seen = LayerStatistics.empty(4, 2, 64)
    seen.update(torch.randn(1, 4, 9, 64), torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 64))
    again = LayerStatistics.from_dict(seen.to_dict())
    assert again.query.count == 9
    assert torch.equal(again.query.mean, seen.query.mean)
    assert torch.equal(again.value.high, seen.value.high)


def test_wrong_shape() -> None:
    with pytest.raises(InvalidInputError, match=r"^x: expected \[batch, 2, tokens, 64\], received \(1, 3, 5, 64\)"):
        RunningStatistics.empty(2, 64).update(torch.zeros(1, 3, 5, 64))
