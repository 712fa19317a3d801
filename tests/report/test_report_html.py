"""The HTML page: everything is in it, nothing is loaded from elsewhere, nothing untrusted is markup."""

import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from fake_results import candidate, comparison

from turboattention.report.figures import FIGURES
from turboattention.report.html import render_html

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> $\\frac{$ \u202e {{ 7 * 7 }}"


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(*args: object, **kwargs: object) -> Page:
    return Page(render_html(comparison(*args, **kwargs), "turboattention compare --html out.html"))  # type: ignore[arg-type]


def test_the_page_holds_every_figure_and_its_meaning() -> None:
    result = comparison(candidate("turbo4", 0.0091, 4.41), candidate("turbo2", 0.31, 2.5))
    text = Page(render_html(result, "turboattention compare --seed 3")).text
    for figure in FIGURES:
        values = [figure.baseline(result.baseline), *(figure.candidate(c) for c in result.candidates)]
        for value in values:
            assert value is None or (value.text in text and value.interval in text), figure.label
        assert figure.meaning in text
    for expected in ("turboattention compare --seed 3", "moby-dick", "2048", "packages.torch", "2.13.0", result.prompt):
        assert expected in text


def test_the_page_is_self_contained() -> None:
    page = render_html(comparison(), "turboattention compare")
    assert "://" not in page
    assert not re.search(r"@import|url\((?!#)", page)
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object", "img", "image"} & set(parsed.tags)
    for name, value in parsed.attributes:
        assert name not in ("src", "data", "action")
        assert not name.endswith("href") or value.startswith("#"), (name, value)
        assert not name.startswith("on")


def test_untrusted_text_is_escaped_everywhere() -> None:
    result = comparison(candidate(EVIL, 0.01, 4.4, continuation=EVIL), model=EVIL, prompt=EVIL)
    page = render_html(result, f"turboattention compare --model {EVIL}")
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "img" not in parsed.tags
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert "<script>alert(1)</script>" in parsed.text
    assert "{{ 7 * 7 }}" in parsed.text
    assert "\u202e" not in page


def test_plots_are_there_and_follow_the_colours_of_the_page() -> None:
    page = render_html(comparison(candidate("turbo4", 0.01, 4.4), candidate("turbo2", 0.3, 2.5)), "")
    assert page.count("<figure") == 3
    plots = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    for plot in plots:
        assert "<svg" in plot
        assert "var(--series-0)" in plot
        assert "var(--series-1)" in plot
        assert not re.search(r"#0[12]01[0-9a-f]{2}", plot)
    identifiers = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(set(identifiers)) == len(identifiers), "one plot would take the clip of another"


def test_differing_words_are_marked() -> None:
    page = page_of(candidate("turbo4", 0.01, 4.4, continuation="It was a dark cold day"))
    assert page.tags.count("mark") >= 2


@pytest.mark.parametrize("count", [1, 9, 12])
def test_any_number_of_candidates(count: int) -> None:
    page = page_of(*(candidate(f"policy-{n}", 0.01 * (n + 1), 4.0) for n in range(count)))
    assert all(f"policy-{n}" in page.text for n in range(count))


def test_zero_divergence_can_be_plotted() -> None:
    exact = candidate("fp16", 1e-12, 16.0)
    exact.kl_by_position.y[:] = [0.0] * len(exact.kl_by_position.y)
    assert "fp16" in page_of(exact, candidate("turbo2", 0.3, 2.5)).text
