"""Plots of a comparison as inline SVG; colours are CSS variables of the page, so that they follow light and dark."""

import re
from io import StringIO
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter, PercentFormatter

from turboattention.evaluation.result import CandidateResult, ComparisonResult, Series
from turboattention.report.figures import BASELINE, size
from turboattention.report.words import printable

COLOURS = 9  # the page defines --series-0 to --series-8
DASHES = ((), (6, 2), (2, 2))  # told apart without colour: one more dash pattern after each three colours

_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_POWER = FuncFormatter(lambda exponent, _: f"{10**exponent:g}")  # the edges of the histogram are log10
_INK, _GRID, _BASELINE = "#010101", "#010102", "#010103"  # placeholders, replaced by CSS in the finished SVG
_VARIABLES = {_INK: "currentColor", _GRID: "var(--grid)", _BASELINE: "var(--muted)"}
_SERIES = tuple(f"#0201{number:02x}" for number in range(COLOURS))
_VARIABLES |= {colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.parse_math": False,
}


def kl_by_position(result: ComparisonResult) -> str:
    """KL divergence (nats, mean of a bin) against the position in the text."""
    with plt.rc_context(_STYLE | {"svg.hashsalt": "position"}):
        figure, axes = _axes()
        curves = [candidate.kl_by_position for candidate in result.candidates]
        for number, curve in enumerate(curves):
            axes.plot(curve.x, curve.y, **_line(number))
        _choose_scale(axes, curves)
        axes.set_xlabel("position in the text, tokens")
        axes.set_ylabel("KL, nats")
        return _svg(figure)


def kl_histogram(result: ComparisonResult) -> str:
    """How the KL divergence spreads over positions: most are close to zero, the tail decides."""
    with plt.rc_context(_STYLE | {"svg.hashsalt": "histogram"}):
        figure, axes = _axes()
        for number, candidate in enumerate(result.candidates):
            steps = candidate.kl_histogram
            axes.step(steps.x, steps.y, where="post", **_line(number))
        axes.xaxis.set_major_locator(MultipleLocator(2))
        axes.xaxis.set_major_formatter(_POWER)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("KL of one position, nats")
        axes.set_ylabel("share of positions")
        return _svg(figure)


def kv_bytes(result: ComparisonResult) -> str:
    """Bytes of the cache: the baseline and each candidate."""
    rows = [(BASELINE, result.baseline.kv_bytes, _BASELINE)]
    rows += [(_label(c), c.kv_bytes, _SERIES[n % COLOURS]) for n, c in enumerate(result.candidates)]
    with plt.rc_context(_STYLE | {"svg.hashsalt": "bytes", "axes.grid": False}):
        figure, axes = _axes(height=0.3 + 0.36 * len(rows))
        bars = axes.barh(range(len(rows)), [row[1] for row in rows], color=[row[2] for row in rows], height=0.66)
        axes.bar_label(bars, [size(row[1]) for row in rows], padding=6)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(row[1] for row in rows))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return _svg(figure)


def dashes(number: int) -> tuple[int, ...]:
    """The dash pattern of candidate ``number``, also for the legend."""
    return DASHES[number // 3 % len(DASHES)]


def _label(candidate: CandidateResult) -> str:
    name = printable(candidate.preset)
    return name if len(name) <= 24 else f"{name[:23]}…"


def _axes(height: float = 3.0) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(6.4, height), layout="constrained")
    axes.set_axisbelow(True)
    return figure, axes


def _line(number: int) -> dict[str, Any]:
    pattern = dashes(number)
    return {
        "color": _SERIES[number % COLOURS],
        "linewidth": 1.6,
        "linestyle": (0, pattern) if pattern else "-",
    }


def _choose_scale(axes: Axes, curves: list[Series]) -> None:
    """Logarithmic when the candidates differ so much that a linear axis would flatten one of them."""
    peaks = [max(curve.y, default=0.0) for curve in curves]
    if peaks and min(peaks) * 5 < max(peaks) and all(y > 0 for curve in curves for y in curve.y):
        axes.set_yscale("log")
        # The first page is not compressed yet: its rounding errors would stretch the axis by many decades.
        axes.set_ylim(bottom=min(peaks) / 30)
        axes.yaxis.set_major_formatter(_PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)


def _svg(figure: Figure) -> str:
    """The ``<svg>`` element alone: no XML prolog, no metadata with addresses, placeholders turned into CSS."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    for colour, css in _VARIABLES.items():
        text = text.replace(colour, css)
    return text
