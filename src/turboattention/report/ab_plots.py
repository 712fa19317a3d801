"""Plots of an A/B run as inline SVG."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from turboattention.report import svg
from turboattention.report.svg import STYLE, line, new_axes, to_svg
from turboattention.serving.result import ABResult, Check

_COLOURS = {"pass": 2, "fail": 4, "not enough data": 5}


def times(curves: Mapping[str, Sequence[float]], label: str) -> str:
    """Share of answers that came within a time; one curve for each side."""
    with plt.rc_context(STYLE | {"svg.hashsalt": label}):
        figure, axes = new_axes()
        for number, values in enumerate(curves.values()):
            shares = [(index + 1) / len(values) for index in range(len(values))]
            axes.step(values, shares, where="post", **line(number))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.02)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{label}, ms")
        axes.set_ylabel("share of answers")
        return to_svg(figure)


def agreeing(result: ABResult) -> str:
    """Share of pairs whose texts are the same so far."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "agreeing"}):
        figure, axes = new_axes()
        axes.step(result.curves.characters, result.curves.agreeing, where="post", **line(0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("characters of the answer")
        axes.set_ylabel("pairs still the same")
        return to_svg(figure)


def limits(checks: Sequence[Check]) -> str:
    """Each interval in multiples of its limit: what lies left of 1 (right of it for agreement) is allowed."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "limits"}):
        figure, axes = new_axes(height=0.8 + 0.42 * len(checks))
        for place, check in enumerate(checks):
            if check.value is None or check.limit == 0:
                continue
            shift = 1.0 if check.name == "max_length_drift" else 0.0
            low, value, high = (
                (number - shift) / check.limit for number in (check.value.low, check.value.value, check.value.high)
            )
            colour = svg.SERIES[_COLOURS[check.outcome]]
            axes.plot([low, high], [place, place], color=colour, linewidth=2.4)
            axes.plot([value], [place], "o", color=colour)
            if shift:
                axes.plot([-1], [place], "|", color=svg.INK, markersize=16)
        axes.axvline(1.0, color=svg.INK, linewidth=1.0)
        axes.set_yticks(range(len(checks)), [check.name.replace("_", " ") for check in checks])
        axes.set_ylim(len(checks) - 0.5, -0.5)
        axes.set_xlabel("multiples of the limit")
        return to_svg(figure)
