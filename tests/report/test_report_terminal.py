"""The tables of the terminal."""

from io import StringIO

import pytest

pytest.importorskip("rich")

from fake_results import candidate, comparison
from rich.console import Console

from turboattention.evaluation.result import ComparisonResult
from turboattention.report.figures import FIGURES
from turboattention.report.terminal import print_comparison


def shown(result: ComparisonResult, width: int) -> str:
    output = StringIO()
    print_comparison(result, Console(file=output, width=width))
    return output.getvalue()


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_value_is_shown_whole(width: int, count: int) -> None:
    result = comparison(*(candidate(f"policy{n}", 0.01 * (n + 1), 4.0 + n) for n in range(count)))
    text = shown(result, width)
    for figure in FIGURES:
        assert figure.label in text
        for one in result.candidates:
            value = figure.candidate(one)
            assert value.text in text
            assert value.interval in text
    assert max(map(len, text.splitlines())) <= width


def test_markup_and_control_characters_stay_text() -> None:
    evil = "[red]name[/] \x1b[2Jcleared\x07"
    text = shown(comparison(candidate(evil, 0.01, 4.4, continuation=evil), model=evil, prompt=evil), 200)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]name[/]" in text
