"""The calibration's page and terminal output: every number is in it, nothing is loaded, nothing untrusted is markup."""

import re
from dataclasses import replace
from io import StringIO

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from fake_calibration import calibration, point
from rich.console import Console
from test_report_html import EVIL, Page

from turboattention.report.calibration import (
    cells,
    first_break,
    print_calibration,
    render_calibration,
    verdict,
)


def test_the_page_holds_everything() -> None:
    result = calibration()
    text = " ".join(Page(render_calibration(result, "turboattention calibrate --seed 3")).text.split())
    for shown in result.points:
        for cell in cells(shown):
            assert cell in text, cell
    for expected in (verdict(result), first_break(result), "turboattention calibrate --seed 3", "0.97", "2.13.0",
                     "share of secret codes lost", "not at any size tried", "67 %", "71 s", "moby-dick"):  # fmt: skip
        assert expected in text, expected


def test_what_the_sentences_say() -> None:
    result = calibration()
    assert (
        "it meets the target max-kl=0.005. The cheapest uniform preset as close to 16-bit is turbo4 at 4.27 bits"
        in (verdict(result))
    )
    assert "it misses the target" in verdict(replace(result, within_target=False))
    assert first_break(result) == (
        "As bits go down, the first thing to leave its limit is share of changed top tokens: 0.0613 at 3.00 bits per "
        "value (limit 0.0500)."
    )
    assert first_break(replace(result, breaks=result.breaks[1:])).startswith("Nothing that was measured leaves")


def test_the_page_is_self_contained_with_distinct_plots() -> None:
    page = render_calibration(calibration(), "turboattention calibrate")
    assert "://" not in page
    assert page.count("<figure") == 6
    assert "mathdefault" not in page, "numbers of an axis as mathematics, which is off"
    assert not re.search(r"#0[12]01[0-9a-f]{2}", page)
    identifiers = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(set(identifiers)) == len(identifiers)
    without = render_calibration(calibration(probes=False), "turboattention calibrate")
    assert without.count("<figure") == 5


def test_untrusted_text_is_escaped() -> None:
    page = render_calibration(calibration(model=EVIL, name=EVIL), f"turboattention calibrate --model {EVIL}")
    parsed = Page(page)
    assert not {"script", "img"} & set(parsed.tags)
    assert "<script>alert(1)</script>" in parsed.text
    assert "\u202e" not in page


def test_a_policy_without_loss_can_be_plotted() -> None:
    result = calibration()
    exact = point("exact", "chosen", 16.0, 0.0)
    assert "exact" in render_calibration(replace(result, points=[exact, *result.points[1:]]), "")


def test_terminal() -> None:
    out = StringIO()
    print_calibration(calibration(), Console(file=out, width=120))
    text = " ".join(out.getvalue().split())
    for shown in calibration().points:
        assert " ".join(cells(shown)) in text
    assert "Rank correlation of estimated and measured sensitivities: 0.97." in text
