"""An ABResult as a self-contained HTML page with plots and texts side by side."""

from typing import Any

from markupsafe import Markup

from turboattention.report import ab_plots as plots
from turboattention.report.ab import LIMITS_HEADER, REVIEW_HEADER, cells, headline, note, remarks, rows, side_name
from turboattention.report.html import render_page, rows_of
from turboattention.report.review import review_rows
from turboattention.report.words import mark_differences, printable
from turboattention.serving.result import ABResult, Flip
from turboattention.serving.review.result import ReviewResult

KINDS = {
    "lost": "Right with the baseline, wrong with the candidate",
    "gained": "Wrong with the baseline, right with the candidate",
    "differs": "Texts that part, the earliest first; the score is the same or there is none",
}
_SHOWN = 900  # characters of a prompt: its end is what the answers go on with


def render_ab(result: ABResult, command: str, review: ReviewResult | None = None) -> str:
    """The page; ``command`` is the command line that made the result, ``review`` what people said of the same pairs."""
    curves = result.curves
    return render_page(
        "ab.html",
        headline=headline(result),
        verdict=result.verdict,
        sides=[(name, side_name(getattr(result, name).description)) for name in ("baseline", "candidate")],
        limits_header=LIMITS_HEADER,
        checks=[cells(check) for check in result.checks],
        rows=rows(result),
        note=note(result),
        review_header=REVIEW_HEADER,
        review=[] if review is None else review_rows(review),
        remarks=remarks(result),
        command=printable(command),
        environment=[*rows_of(result.environment), *rows_of(_without_limits(result.settings))],
        groups=[(title, found) for kind, title in KINDS.items() if (found := _flips(result.flips, kind))],
        plots={
            "limits": Markup(plots.limits(result.checks)) if result.checks else None,
            "ttft": Markup(plots.times(curves.ttft_ms, "time to first token")),
            "tpot": Markup(plots.times(curves.tpot_ms, "time per token")),
            "agreeing": Markup(plots.agreeing(result)),
        },
    )


def _without_limits(settings: dict[str, Any]) -> dict[str, Any]:
    """They have a table of their own."""
    return {name: value for name, value in settings.items() if name != "limits"}


def _flips(flips: list[Flip], kind: str) -> list[dict[str, Any]]:
    return [
        {
            "id": printable(flip.id),
            "prompt": _end(printable(flip.prompt).strip()),
            "references": printable(", ".join(flip.references)),
            "pair": mark_differences(flip.baseline.strip(), flip.candidate.strip()),
        }
        for flip in flips
        if flip.kind == kind
    ]


def _end(text: str) -> str:
    return text if len(text) <= _SHOWN else f"… {text[-_SHOWN:]}"
