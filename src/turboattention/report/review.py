"""A ReviewResult as Markdown; the terminal shows the same."""

from turboattention.report.words import markdown_text
from turboattention.serving.review.result import Counts, ReviewResult


def review_rows(result: ReviewResult) -> list[tuple[str, str]]:
    """What was judged, then figures with 95 % intervals."""
    raters = len(result.raters)
    return [
        ("pairs judged", f"{result.judged} of {result.pairs}; {result.counts.total} judgements, {raters} raters"),
        ("pairs whose winner is the candidate", _share(result.preferred)),
        ("pairs where the candidate is not worse", _share(result.not_worse)),
        ("net preference (-1 to 1, above 0: candidate)", _number(result.net)),
        ("as many pairs for either side, p", "-" if result.sign_p is None else f"{result.sign_p:.3g}"),
        ("judgements that call both bad", f"{result.both_bad:.1%}"),
        ("agreement between raters (Krippendorff's alpha)", _number(result.agreement)),
        ("judgements for the left side (50 %: no bias)", _share(result.left)),
    ]


def render_review(result: ReviewResult) -> str:
    """Figures, then counts by rater."""
    lines = [
        "# Blind review", "",
        f"{markdown_text(result.source)}; sides shuffled with seed {result.seed}.", "",
        "| figure | value (95 % interval; count) |", "|---|---|",
        *(f"| {name} | {value} |" for name, value in review_rows(result)), "",
        "| rater | candidate better | baseline better | tie | both bad |", "|---|---|---|---|---|",
        *(_counts(rater, counts) for rater, counts in result.raters.items()), _counts("all", result.counts),
    ]  # fmt: skip
    if result.bad_lines:
        lines += [
            "",
            f"Left out, {len(result.bad_lines)} lines:",
            "",
            *(f"- {markdown_text(line)}" for line in result.bad_lines),
        ]
    return "\n".join(lines) + "\n"


def _counts(name: str, counts: Counts) -> str:
    return f"| {markdown_text(name)} | {counts.candidate} | {counts.baseline} | {counts.tie} | {counts.both_bad} |"


def _share(found: tuple[float, float, float, int] | None) -> str:
    if found is None:
        return "-"
    value, low, high, of = found
    return f"{value:.1%} ({low:.1%} to {high:.1%}; {of})"


def _number(found: tuple[float, float, float, int] | None) -> str:
    if found is None:
        return "-"
    value, low, high, of = found
    return f"{value:.2f} ({low:.2f} to {high:.2f}; {of})"
