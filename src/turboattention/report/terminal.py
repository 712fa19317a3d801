"""A ComparisonResult as tables in the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from turboattention.evaluation.result import CandidateResult, ComparisonResult
from turboattention.report.figures import BASELINE, FIGURES, Value
from turboattention.report.words import Piece, mark_differences, printable

_LABEL_WIDTH = 22
_COLUMN_WIDTH = 19  # an interval such as "98.91 to 99.27 %" with its margins
_PROMPT_SHOWN = 300  # the end of a longer prompt is what the continuations go on with


def print_comparison(result: ComparisonResult, console: Console) -> None:
    """The figures, then each continuation beside the baseline's."""
    texts = ", ".join(printable(name) for name in result.text)
    console.print(Text(f"{printable(result.model)} · {result.tokens} tokens of each of: {texts}", style="bold"))
    per_table = max(1, (console.width - _LABEL_WIDTH) // _COLUMN_WIDTH - 1)
    for start in range(0, len(result.candidates), per_table):
        console.print(_figures(result, result.candidates[start : start + per_table]))
    note = "Second lines: 95 % bootstrap intervals. Lower perplexity, nats and KL are better."
    console.print(Text(note, style="dim"))
    prompt = printable(result.prompt).strip()
    shown = prompt if len(prompt) <= _PROMPT_SHOWN else f"… {prompt[-_PROMPT_SHOWN:]}"
    console.print(Text.assemble(("\nPrompt: ", "bold"), shown))
    for candidate in result.candidates:
        console.print(_continuations(result, candidate))


def _figures(result: ComparisonResult, candidates: list[CandidateResult]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column(BASELINE, justify="right", min_width=16)
    for candidate in candidates:
        table.add_column(Text(printable(candidate.preset)), justify="right", min_width=16)
    for figure in FIGURES:
        table.add_row(
            Text(figure.label),
            _cell(figure.baseline(result.baseline)),
            *(_cell(figure.candidate(candidate)) for candidate in candidates),
        )
    return table


def _cell(value: Value | None) -> Text:
    if value is None:
        return Text("-", style="dim")
    text = Text(value.text)
    if value.interval:
        text.append(f"\n{value.interval}", style="dim")
    return text


def _continuations(result: ComparisonResult, candidate: CandidateResult) -> Table:
    before, after = mark_differences(result.baseline.continuation.strip(), candidate.continuation.strip())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column(BASELINE, ratio=1)
    table.add_column(Text(printable(candidate.preset)), ratio=1)
    table.add_row(_marked(before), _marked(after))
    return table


def _marked(pieces: list[Piece]) -> Text:
    return Text.assemble(*((piece.text, "reverse" if piece.differs else "") for piece in pieces))
