"""A ComparisonResult as one self-contained HTML page: no scripts, no requests, everything untrusted escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from turboattention.evaluation.result import ComparisonResult
from turboattention.report import plots, svg
from turboattention.report.figures import BASELINE, FIGURES, summary
from turboattention.report.words import mark_differences, printable


def render_html(result: ComparisonResult, command: str) -> str:
    """The page; ``command`` is the command line that made the result."""
    return render_page(
        "comparison.html",
        model=printable(result.model),
        texts=[printable(name) for name in result.text],
        tokens=result.tokens,
        prompt=printable(result.prompt).strip(),
        command=printable(command),
        environment=rows_of(result.environment),
        baseline_name=BASELINE,
        candidates=[
            {
                "name": printable(candidate.preset),
                "summary": summary(candidate),
                "result": candidate,
                "colour": number % svg.COLOURS,
                "dashes": " ".join(map(str, svg.dashes(number))),
                "pair": mark_differences(result.baseline.continuation.strip(), candidate.continuation.strip()),
            }
            for number, candidate in enumerate(result.candidates)
        ],
        rows=[
            {
                "label": figure.label,
                "meaning": figure.meaning,
                "baseline": figure.baseline(result.baseline),
                "candidates": [figure.candidate(candidate) for candidate in result.candidates],
            }
            for figure in FIGURES
        ],
        plots={
            "bytes": Markup(plots.kv_bytes(result)),
            "position": Markup(plots.kl_by_position(result)),
            "histogram": Markup(plots.kl_histogram(result)),
        },
    )


def render_page(template: str, **values: Any) -> str:
    """A template that extends ``page.html``, with the style that all pages share."""
    loader = PackageLoader("turboattention.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    style = Markup(loader.get_source(environment, "page.css")[0])
    return environment.get_template(template).render(style=style, **values)


def rows_of(environment: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as flat rows ``a.b``."""
    rows: list[tuple[str, str]] = []
    for key, value in environment.items():
        name = printable(f"{prefix}{key}")
        if isinstance(value, dict):
            rows += rows_of(value, f"{name}.")
        else:
            rows.append((name, "none" if value is None else printable(str(value))))
    return rows
