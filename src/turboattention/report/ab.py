"""An ABResult in the terminal and as Markdown: the verdict, the limits, the figures, the remarks."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from turboattention.report.figures import small
from turboattention.report.review import review_rows
from turboattention.report.words import markdown_text, printable
from turboattention.serving.result import ABResult, Check, Measured, SideResult, Spread
from turboattention.serving.review.result import ReviewResult

VERDICTS = {
    "pass": "Pass: every limit holds.",
    "fail": "Fail: a limit does not hold.",
    "not enough data": "Not enough data: at least one limit cannot be decided.",
    "no limits": "No limits were set, so there is no verdict.",
}

REVIEW_HEADER = ("judged blind by people", "value (95 % interval; count)")
LIMITS_HEADER = ("limit", "at", "measured", "outcome", "why")


class Row(NamedTuple):
    """baseline, candidate: each side alone; comparison: candidate against baseline, with its interval."""

    label: str
    baseline: str
    candidate: str
    comparison: str = ""


def headline(result: ABResult) -> list[str]:
    """The verdict, and why it may not be the last word."""
    lines = [VERDICTS[result.verdict]]
    if result.stopped:
        done = f"{result.baseline.answers} and {result.candidate.answers} of {result.requests} samples"
        lines.append(f"PARTIAL: {done} were asked ({printable(result.stopped)}). The same command goes on.")
    if result.bad_lines:
        lines.append(f"{len(result.bad_lines)} lines of the request file were left out.")
    return lines


def side_name(description: dict[str, str]) -> str:
    """Address or policy, and the model."""
    where = description.get("url") or description.get("policy", "")
    return printable(f"{where} ({description.get('model') or 'the model that it serves'})")


def rows(result: ABResult) -> list[Row]:
    """The table of all reports."""
    b, c, p = result.baseline, result.candidate, result.paired
    first = "-" if p.first_difference is None else f"{p.first_difference:g}"
    p_value = "-" if p.mcnemar_p is None else f"{p.lost}, {p.gained}, {small(p.mcnemar_p)}"
    return [
        Row("answers", str(b.answers), str(c.answers)),
        Row("errors", _errors(b), _errors(c)),
        Row("time to first token, ms: p50, p90, p99", _spread(b.ttft_ms), _spread(c.ttft_ms), _ratio(p.ttft_ratio)),
        Row("time per token, ms: p50, p90, p99", _spread(b.tpot_ms), _spread(c.tpot_ms), _ratio(p.tpot_ratio)),
        Row("pause in the stream, ms: p50, p90, p99", _spread(b.gap_ms), _spread(c.gap_ms)),
        Row("tokens/s while a request is in flight", _number(b.tokens_per_s), _number(c.tokens_per_s)),
        Row(
            f"mean length, {p.length_unit}",
            _length(b, p.length_unit),
            _length(c, p.length_unit),
            _ratio(p.length_ratio),
        ),
        Row("pairs of whole answers", "", "", str(p.pairs)),
        Row("same text", "", "", percent(p.same)),
        Row("part before the first difference", "", "", percent(p.prefix_share)),
        Row(f"first difference at, median, {p.first_difference_unit}", "", "", first),
        Row("log-probability, candidate minus baseline, nats/token", "", "", measured(p.logprob_difference)),
        Row("log-probability, mean distance, nats/token", "", "", measured(p.logprob_distance)),
        Row("right answers", _share(b.score), _share(c.score), percent(p.score_difference)),
        Row("right answers, bootstrap interval", "", "", percent(p.score_bootstrap)),
        Row("flips: lost, gained, p of McNemar's test", "", "", p_value),
    ]


def cells(check: Check) -> tuple[str, str, str, str, str]:
    """Option, limit, what was measured, outcome, reason."""
    option = "--" + check.name.replace("_", "-")
    return option, f"{check.limit:g}", measured(check.value), check.outcome, check.reason


def remarks(result: ABResult) -> list[str]:
    """What a reader has to know before believing a figure, left-out lines and errors included."""
    lines = [f"line {bad['line']} of the request file was left out: {bad['reason']}" for bad in result.bad_lines]
    for side, found in (("baseline", result.baseline), ("candidate", result.candidate)):
        lines += [f"{side}, an error: {example}" for example in found.error_examples]
    return [printable(line) for line in [*result.remarks, *lines]]


def note(result: ABResult) -> str:
    """How to read the last column."""
    confidence = 100 * float(result.settings["limits"]["confidence"])
    return (
        f"In brackets: {confidence:g} % intervals (shares exact, differences of right answers by Tango's score, the "
        "rest paired bootstrap). Ratios are candidate over baseline. Times and lengths are of answers without error; "
        "a failed answer counts as wrong."
    )


def print_ab(result: ABResult, console: Console, review: ReviewResult | None = None) -> None:
    """Everything but the texts; ``review``: what people said of the same pairs."""
    for number, text in enumerate(headline(result)):
        console.print(Text(text, style="" if number else "bold"))
    sides = (side_name(side.description) for side in (result.baseline, result.candidate))
    console.print(Text("baseline {}\ncandidate {}".format(*sides)))
    if result.checks:
        console.print(_table(LIMITS_HEADER, map(cells, result.checks)))
    console.print(_table(("", "baseline", "candidate", "candidate against baseline"), rows(result)))
    console.print(Text(note(result), style="dim"))
    if review is not None:
        console.print(_table(REVIEW_HEADER, review_rows(review)))
    for remark in remarks(result):
        console.print(Text(f"- {remark}"))


def markdown(result: ABResult, command: str, review: ReviewResult | None = None) -> str:
    """The same, without the texts and the plots, which are in the page."""
    first, *others = headline(result)
    parts = [f"# {markdown_text(first)}", *map(markdown_text, others)]
    sides = ((name, getattr(result, name).description) for name in ("baseline", "candidate"))
    parts.append("\n".join(f"- {name}: {markdown_text(side_name(description))}" for name, description in sides))
    if result.checks:
        parts.append(_markdown_table(LIMITS_HEADER, map(cells, result.checks)))
    parts.append(_markdown_table(("", "baseline", "candidate", "candidate against baseline"), rows(result)))
    parts.append(note(result))
    if review is not None:
        parts.append(_markdown_table(REVIEW_HEADER, review_rows(review)))
    if remarks(result):
        parts.append("\n".join(f"- {markdown_text(remark)}" for remark in remarks(result)))
    parts.append("Command:\n\n    " + " ".join(printable(command).split()))
    return "\n\n".join(parts) + "\n"


def measured(value: Measured | None) -> str:
    """A value with its interval."""
    return "-" if value is None else f"{small(value.value)} ({small(value.low)} to {small(value.high)})"


def percent(value: Measured | None) -> str:
    """The same for a share."""
    if value is None:
        return "-"
    return f"{100 * value.value:.1f} % ({100 * value.low:.1f} to {100 * value.high:.1f})"


def _ratio(value: Measured | None) -> str:
    return "-" if value is None else f"{value.value:.3f}x ({value.low:.3f} to {value.high:.3f})"


def _spread(value: Spread | None) -> str:
    return "-" if value is None else ", ".join(f"{one:.1f}" for one in (value.p50, value.p90, value.p99))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _length(side: SideResult, unit: str) -> str:
    return _number(side.tokens if unit == "tokens" else side.characters)


def _errors(side: SideResult) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in side.errors.items())
    return f"{percent(side.error_rate)}{': ' if kinds else ''}{kinds}"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, overflow="fold", no_wrap=not number and header == LIMITS_HEADER)
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def _markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [header, ["---"] * len(header), *(list(map(markdown_text, line)) for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in body)
