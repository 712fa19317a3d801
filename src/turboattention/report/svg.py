"""Plots as inline SVG; colours are CSS variables of the page, so that they follow light and dark."""

import re
from io import StringIO
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

COLOURS = 9  # the page defines --series-0 to --series-8
DASHES = ((), (6, 2), (2, 2))  # told apart without colour: one more dash pattern after each three colours

PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
INK, GRID, BASELINE = "#010101", "#010102", "#010103"  # placeholders, replaced by CSS in the finished SVG
SERIES = tuple(f"#0201{number:02x}" for number in range(COLOURS))
_VARIABLES = {INK: "currentColor", GRID: "var(--grid)", BASELINE: "var(--muted)"}
_VARIABLES |= {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,
}


def new_axes(height: float = 3.0) -> tuple[Figure, Axes]:
    """A figure with one plot; inside ``plt.rc_context(STYLE | {"svg.hashsalt": NAME})``."""
    figure, axes = plt.subplots(figsize=(6.4, height), layout="constrained")
    axes.set_axisbelow(True)
    return figure, axes


def logarithmic(axes: Axes, *, x: bool = False) -> None:
    """A logarithmic y axis (and x axis) with plain numbers: mathematics in labels is off."""
    axes.set_yscale("log")
    if x:
        axes.set_xscale("log")
    for axis in (axes.yaxis, axes.xaxis)[: 1 + x]:
        axis.set_major_formatter(PLAIN)
        axis.set_minor_formatter(NullFormatter())


def dashes(number: int) -> tuple[int, ...]:
    """The dash pattern of curve ``number``, also for the legend."""
    return DASHES[number // 3 % len(DASHES)]


def line(number: int) -> dict[str, Any]:
    """How curve ``number`` is drawn."""
    pattern = dashes(number)
    return {
        "color": SERIES[number % COLOURS],
        "linewidth": 1.6,
        "linestyle": (0, pattern) if pattern else "-",
    }


def to_svg(figure: Figure) -> str:
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
