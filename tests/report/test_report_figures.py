"""How numbers are written."""

from dataclasses import replace

import pytest
from fake_results import candidate

from turboattention.evaluation.result import Interval
from turboattention.report.figures import size, small, summary


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (38923731, "37.12 MiB"), (5 * 2**30, "5.00 GiB")],
)
def test_size(number: int, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0.0, "0.0000"), (3e-7, "3.0e-07"), (-2.5e-4, "-2.5e-04"), (0.0091, "0.0091"), (8.2, "8.2000")]
)
def test_small_numbers_never_read_as_zero(number: float, text: str) -> None:
    assert small(number) == text


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.001, 0.003), "quality falls by 0.0020 nats"),
        ((-0.001, 0.005), "no loss of quality can be told from zero"),
        ((-0.004, -0.001), "others may not"),
    ],
)
def test_the_sentence_follows_the_interval(interval: tuple[float, float], words: str) -> None:
    delta = -0.002 if interval[1] < 0 else 0.002
    assert words in summary(replace(candidate("p", 0.01, 4), delta_nll=delta, delta_nll_ci=Interval(*interval)))
