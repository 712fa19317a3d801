"""A CalibrationResult in the terminal and as a self-contained HTML page."""

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from turboattention.calibration.result import Break, CalibrationResult, Point
from turboattention.report.figures import small
from turboattention.report.words import printable

KINDS = {
    "chosen": "written to the policy file",
    "calibrated": "same allocation, other size",
    "uniform": "preset, the same bits everywhere",
    "paper": "preset of arXiv 2412.08585",
    "kivi": "preset of arXiv 2402.02750",
    "rule": "the paper's choice of heads, our formats",
}


def verdict(result: CalibrationResult) -> str:
    """The finding in one or two sentences."""
    point = result.chosen
    met = "meets" if result.within_target else "misses"
    best = [x for x in result.points if x.kind == "uniform" and x.kl <= point.kl]
    text = (
        f"{point.bits_per_value:.2f} bits per value, {16 / point.bits_per_value:.2f} times less than 16-bit, with a KL "
        f"of {small(point.kl)} nats per token on held-out text: it {met} the target {result.target}."
    )
    if best:
        least = min(best, key=lambda x: x.bits_per_value)
        text += f" The cheapest uniform preset as close to 16-bit is {least.name} at {least.bits_per_value:.2f} bits."
    return text


def first_break(result: CalibrationResult) -> str:
    """What breaks first as bits go down, in one sentence."""
    first = result.breaks[0]
    if first.bits_per_value is None or first.value is None:
        return "Nothing that was measured leaves its limit at any size that was tried."
    return (
        f"As bits go down, the first thing to leave its limit is {first.measure}: {small(first.value)} at "
        f"{first.bits_per_value:.2f} bits per value (limit {small(first.limit)})."
    )


def print_calibration(result: CalibrationResult, console: Console) -> None:
    """The verdict and the points."""
    texts = ", ".join(printable(name) for name in result.held_out)
    title = f"{printable(result.model)} · held-out: {result.held_out_tokens} tokens of each of: {texts}"
    console.print(Text(title, style="bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("policy", "bits/value", "KL, nats", "added nats", "same top token"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for point in sorted(result.points, key=lambda x: x.bits_per_value):
        style = "bold" if point.kind == "chosen" else ""
        table.add_row(*(Text(cell, style=style) for cell in cells(point)))
    console.print(table)
    lines = [verdict(result), first_break(result)]
    if result.spearman is not None:
        lines.append(f"Rank correlation of estimated and measured sensitivities: {result.spearman:.2f}.")
    for text in lines:
        console.print(Text(text))


def cells(point: Point) -> list[str]:
    """A row of the table."""
    low, high = point.kl_ci
    return [
        printable(point.name),
        f"{point.bits_per_value:.3f}",
        f"{small(point.kl)} ({small(low)} to {small(high)})",
        f"{point.added_nats:+.4f}",
        f"{100 * point.top1_agreement:.2f} %",
    ]


def render_calibration(result: CalibrationResult, command: str) -> str:
    """The page; ``command`` is the command line that made the result."""
    from turboattention.report import calibration_plots as plots  # plotting is slow to import
    from turboattention.report import svg
    from turboattention.report.html import render_page, rows_of

    curves = [x for x in result.points if x.kind in ("chosen", "uniform")]
    return render_page(
        "calibration.html",
        result=result,
        model=printable(result.model),
        texts=[printable(name) for name in result.texts],
        held_out=[printable(name) for name in result.held_out],
        verdict=verdict(result),
        first_break=first_break(result),
        command=printable(command),
        environment=[
            *((name, f"{value:.0f} s") for name, value in result.seconds.items()),
            *rows_of(result.environment),
        ],
        points=[(KINDS[x.kind], cells(x)) for x in sorted(result.points, key=lambda x: x.bits_per_value)],
        tasks=[(printable(name), small(kl)) for name, kl in result.chosen.kl_by_text.items()],
        retrieval=[
            (printable(x.name), f"{x.bits_per_value:.2f}", f"{100 * x.exact:.0f} %", small(x.gold_nll))
            for x in result.retrieval
        ],
        breaks=[_break_cells(x) for x in result.breaks],
        legend=[
            (printable(x.name), number % svg.COLOURS, " ".join(map(str, svg.dashes(number))))
            for number, x in enumerate(curves)
        ],
        plots={
            "pareto": Markup(plots.pareto(result)),
            "position": Markup(plots.kl_by_position(curves)),
            "depth": Markup(plots.depth(result)),
            "bounds": Markup(plots.bounds(result)),
            "layers": Markup(plots.layer_bits(result)),
            "probes": Markup(plots.probes(result)) if result.probes else None,
        },
    )


def _break_cells(found: Break) -> tuple[str, str, str, str]:
    if found.bits_per_value is None or found.value is None:
        return printable(found.measure), small(found.limit), "not at any size tried", ""
    return printable(found.measure), small(found.limit), f"{found.bits_per_value:.2f}", small(found.value)
