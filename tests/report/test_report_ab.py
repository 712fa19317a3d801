"""The reports of an A/B run: every figure, nothing untrusted as markup, partial runs that say so."""

import re
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from rich.console import Console
from test_report_html import EVIL, Page

from turboattention.report.ab import cells, markdown, print_ab, rows
from turboattention.report.ab_page import render_ab
from turboattention.serving.analyse import analyse
from turboattention.serving.answer import SIDES, Answer, Failure
from turboattention.serving.limits import Limits
from turboattention.serving.prompts import BadLine, Request
from turboattention.serving.result import ABResult

LIMITS = Limits(max_score_drop=0.2, max_length_drift=0.5, max_ttft_ratio=0.0, max_logprob_distance=1.0, min_samples=2)


def result(text: str = "the answer", count: int = 6, **options: Any) -> ABResult:
    """Sides differ in every third sample; one answer of the candidate failed."""
    requests = [Request(f"{text} {i}", text, references=(text,)) for i in range(count)]
    answers = {}
    for request in requests:
        for side in SIDES:
            number = len(answers)
            written = text if side == "baseline" or number % 3 else f"{text[:3]} otherwise"
            times = [0.01 * (number + 1), 0.02 * (number + 1)]
            error = Failure("http", text) if number == 5 else None
            answers[request.id, side] = Answer(request.id, side, written, number, 1.0, times, 2, error=error)
    settings = {
        "limits": {"confidence": 0.95},
        **{side: {"kind": "endpoint", "url": "http://host/v1", "model": text} for side in SIDES},
    }
    return analyse(requests, answers, LIMITS, {"date": "today"}, settings, [BadLine(3, text)], [text], **options)


def test_every_report_holds_every_figure() -> None:
    found = result()
    console = Console(record=True, width=220, file=open("/dev/null", "w"))  # noqa: SIM115
    print_ab(found, console)
    texts = [
        " ".join(Page(render_ab(found, "turboattention ab")).text.split()),
        console.export_text(),
        markdown(found, "x"),
    ]
    for row in (*rows(found), *map(cells, found.checks)):
        for text in texts:
            for cell in row:
                assert " ".join(cell.split()) in text, cell
    assert "host/v1" in texts[0]
    assert "line 3 of the request file was left out" in texts[2]


def test_untrusted_text_is_escaped_everywhere() -> None:
    page = render_ab(result(EVIL), f"turboattention ab --out {EVIL}")
    assert "://" not in re.sub(r"http://host/v1|http: //host", "", page)
    parsed = Page(page)
    assert not {"script", "img", "link"} & set(parsed.tags)
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert "<script>alert(1)</script>" in parsed.text
    for text in (page, markdown(result(EVIL), EVIL)):
        assert "\u202e" not in text
    lines = markdown(result("a | b\n# <b>"), "x").splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5, 6}
    assert not any(line.startswith("# <") for line in lines)


def test_a_partial_run_says_so() -> None:
    found = result(stopped="candidate: expected a server")
    for text in (render_ab(found, ""), markdown(found, "")):
        assert "PARTIAL: 6 and 6 of 6 samples were asked (candidate: expected a server)" in text


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_without_answers_has_reports(count: int) -> None:
    found = result(count=count, stopped="interrupted")
    assert found.verdict == "not enough data"
    assert render_ab(found, "").count("<svg") >= 4
    assert "Not enough data" in markdown(found, "")
    assert replace(found, checks=[], verdict="no limits").to_dict()["schema"] == 1
