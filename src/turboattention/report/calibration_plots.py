"""Plots of a calibration as inline SVG."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from turboattention.calibration.result import CalibrationResult, Point
from turboattention.report import svg
from turboattention.report.svg import STYLE, line, logarithmic, new_axes, to_svg
from turboattention.report.words import printable

MARKERS = {"chosen": "*", "calibrated": "o", "uniform": "s", "paper": "X", "kivi": "D", "rule": "^"}
COLOUR = {"chosen": 0, "calibrated": 0, "uniform": 1, "paper": 4, "kivi": 3, "rule": 2}
_FLOOR = 1e-7  # nats: exact policies have no place on a logarithmic axis


def pareto(result: CalibrationResult) -> str:
    """KL against bits: the calibrated sizes as a line, everything else as points."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "pareto"}):
        figure, axes = new_axes(height=3.8)
        curve = sorted((x for x in result.points if x.kind in ("chosen", "calibrated")), key=lambda x: x.bits_per_value)
        axes.plot([x.bits_per_value for x in curve], [_shown(x) for x in curve], **line(0))
        for point in result.points:
            colour = svg.SERIES[COLOUR[point.kind]]
            size = 170 if point.kind == "chosen" else 34
            axes.scatter(
                point.bits_per_value, _shown(point), s=size, marker=MARKERS[point.kind], color=colour, zorder=3
            )
            if point.kind != "calibrated":
                axes.annotate(
                    printable(point.name)[:28], (point.bits_per_value, _shown(point)), xytext=(6, 4),
                    textcoords="offset points", fontsize=9,
                )  # fmt: skip
        logarithmic(axes)
        axes.set_xlabel("bits per value, every byte of the cache counted")
        axes.set_ylabel("KL, nats per token")
        axes.margins(x=0.16)
        return to_svg(figure)


def kl_by_position(points: list[Point]) -> str:
    """KL against the position in the text."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "calibration-position"}):
        figure, axes = new_axes()
        for number, point in enumerate(points):
            axes.plot(point.kl_by_position.x, [max(y, _FLOOR) for y in point.kl_by_position.y], **line(number))
        logarithmic(axes)
        highest = max(max(point.kl_by_position.y) for point in points)
        axes.set_ylim(bottom=max(_FLOOR, highest * 1e-4))  # the first page is exact
        axes.set_xlabel("position in the text, tokens")
        axes.set_ylabel("KL, nats")
        return to_svg(figure)


def depth(result: CalibrationResult) -> str:
    """Relative error of the hidden state after each layer."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "depth"}):
        figure, axes = new_axes()
        axes.plot(range(len(result.depth)), result.depth, **line(0))
        axes.set_ylim(bottom=0)
        _layer_axis(axes)
        axes.set_ylabel("error / hidden state")
        return to_svg(figure)


def bounds(result: CalibrationResult) -> str:
    """Error of each head's output: what its scales allow, and what was seen."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "bounds"}):
        figure, axes = new_axes()
        layers = [x.layer for x in result.heads]
        axes.scatter(layers, [max(x.bound, _FLOOR) for x in result.heads], s=16, marker="^", color=svg.SERIES[1])
        axes.scatter(layers, [max(x.seen, _FLOOR) for x in result.heads], s=16, marker="o", color=svg.SERIES[0])
        logarithmic(axes)
        _layer_axis(axes)
        axes.set_ylabel("error / output of the head")
        return to_svg(figure)


def layer_bits(result: CalibrationResult) -> str:
    """What each layer got."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "layers"}):
        figure, axes = new_axes()
        layers = [x.layer for x in result.layers]
        axes.step(layers, [x.key_bits for x in result.layers], where="mid", **line(0))
        axes.margins(y=0.1)
        axes.step(layers, [x.value_bits for x in result.layers], where="mid", **line(3) | {"color": svg.SERIES[1]})
        axes.set_ylim(bottom=0)
        _layer_axis(axes)
        axes.set_ylabel("bits of the codes")
        return to_svg(figure)


def probes(result: CalibrationResult) -> str:
    """Estimated against measured sensitivity."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "probes"}):
        figure, axes = new_axes()
        estimated = [max(x.estimated, 1e-9) for x in result.probes]
        measured = [max(x.measured, 1e-9) for x in result.probes]
        ends = [min(estimated + measured), max(estimated + measured)]
        axes.plot(ends, ends, color=svg.BASELINE, linewidth=1.0)
        axes.scatter(measured, estimated, s=22, color=svg.SERIES[0], zorder=3)
        logarithmic(axes, x=True)
        axes.set_xlabel("measured KL, nats per token")
        axes.set_ylabel("estimated")
        return to_svg(figure)


def _layer_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")


def _shown(point: Point) -> float:
    return max(point.kl, _FLOOR)
