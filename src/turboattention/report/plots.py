"""Plots of a comparison as inline SVG."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter, PercentFormatter

from turboattention.evaluation.result import CandidateResult, ComparisonResult, Series
from turboattention.report import svg
from turboattention.report.figures import BASELINE, size
from turboattention.report.svg import STYLE, line, new_axes, to_svg
from turboattention.report.words import printable

_POWER = FuncFormatter(lambda exponent, _: f"{10**exponent:g}")  # the edges of the histogram are log10


def kl_by_position(result: ComparisonResult) -> str:
    """KL divergence (nats, mean of a bin) against the position in the text."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "position"}):
        figure, axes = new_axes()
        curves = [candidate.kl_by_position for candidate in result.candidates]
        for number, curve in enumerate(curves):
            axes.plot(curve.x, curve.y, **line(number))
        _choose_scale(axes, curves)
        axes.set_xlabel("position in the text, tokens")
        axes.set_ylabel("KL, nats")
        return to_svg(figure)


def kl_histogram(result: ComparisonResult) -> str:
    """How the KL divergence spreads over positions: most are close to zero, the tail decides."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "histogram"}):
        figure, axes = new_axes()
        for number, candidate in enumerate(result.candidates):
            steps = candidate.kl_histogram
            axes.step(steps.x, steps.y, where="post", **line(number))
        axes.xaxis.set_major_locator(MultipleLocator(2))
        axes.xaxis.set_major_formatter(_POWER)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("KL of one position, nats")
        axes.set_ylabel("share of positions")
        return to_svg(figure)


def kv_bytes(result: ComparisonResult) -> str:
    """Bytes of the cache: the baseline and each candidate."""
    rows = [(BASELINE, result.baseline.kv_bytes, svg.BASELINE)]
    rows += [(_label(c), c.kv_bytes, svg.SERIES[n % svg.COLOURS]) for n, c in enumerate(result.candidates)]
    with plt.rc_context(STYLE | {"svg.hashsalt": "bytes", "axes.grid": False}):
        figure, axes = new_axes(height=0.3 + 0.36 * len(rows))
        bars = axes.barh(range(len(rows)), [row[1] for row in rows], color=[row[2] for row in rows], height=0.66)
        axes.bar_label(bars, [size(row[1]) for row in rows], padding=6)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(row[1] for row in rows))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return to_svg(figure)


def _label(candidate: CandidateResult) -> str:
    name = printable(candidate.preset)
    return name if len(name) <= 24 else f"{name[:23]}…"


def _choose_scale(axes: Axes, curves: list[Series]) -> None:
    """Logarithmic when the candidates differ so much that a linear axis would flatten one of them."""
    peaks = [max(curve.y, default=0.0) for curve in curves]
    if peaks and min(peaks) * 5 < max(peaks) and all(y > 0 for curve in curves for y in curve.y):
        axes.set_yscale("log")
        # The first page is not compressed yet: its rounding errors would stretch the axis by many decades.
        axes.set_ylim(bottom=min(peaks) / 30)
        axes.yaxis.set_major_formatter(svg.PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
