"""The plot of `run.py`: how many times faster than 16-bit decode, against the tokens of the batch.

python benchmarks/plot.py benchmarks/results/operators.csv      # draws it again from the rows
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

LINES = {
    "turbo4": ("4 bits", "tab:blue", "o"),
    "turbo4-v2": ("K 4 bits, V 2 bits", "tab:green", "s"),
    "turbo2": ("2 bits", "tab:red", "^"),
}


def plot(rows: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
    """Draw decode rows of the common shape as PNG and SVG beside ``stem``; nothing when there are none."""
    points = _points(rows)
    if not points:
        return []
    matplotlib.use("Agg")
    figure = Figure(figsize=(8.5, 5.4), layout="constrained")
    axes = figure.add_subplot()
    for form, (label, colour, marker) in LINES.items():
        if form not in points:
            continue
        tokens = sorted(points[form])
        bits = [b for t in tokens for _, b in points[form][t]]
        limit = 16 / (sum(bits) / len(bits))
        best = [max(ratio for ratio, _ in points[form][t]) for t in tokens]
        everything = [(t, ratio) for t in tokens for ratio, _ in points[form][t]]
        axes.plot(tokens, best, color=colour, marker=marker, label=label)
        axes.plot(*zip(*everything, strict=True), marker, color=colour)
        axes.axhline(limit, color=colour, linestyle="--", linewidth=1)
        axes.annotate(
            f"{limit:.2f}: what\nthe bytes allow", (1.0, limit), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", ha="left", va="center", color=colour, fontsize=9,
        )  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({t for form in points.values() for t in form}))
    axes.set_xticklabels([f"{t // 1024}k" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, None)
    axes.margins(x=0.04)
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set_xlabel("tokens in the batch (sequences x tokens of each)")
    axes.set_ylabel("speed-up over the fastest 16-bit decode (times)")
    first = next(row for row in rows if row["op"] == "decode" and row["ratio"])
    axes.set_title(
        "Decode, 32 query / 8 KV heads, head_dim 128, pages in random order\n"
        f"{first['device']}, torch {first['torch']}, triton {first['triton']}, "
        f"turboattention {first['turboattention']}",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=len(LINES), frameon=False)
    axes.grid(alpha=0.25)
    paths = [stem.with_suffix(kind) for kind in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _points(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """(ratio, bits per value) by form and tokens of the batch: even batches of the common shape, against 16 bits."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        shape = tuple(int(row[name]) for name in ("query_heads", "kv_heads", "head_dim"))
        wanted = row["op"] == "decode" and row["preset"] in LINES and shape == (32, 8, 128) and row["ratio"]
        own = str(row["name"]) in ("decode 4 bits", "decode 2 bits", "decode K4/V2")
        if wanted and own and not row["failure"]:
            found[row["preset"]][int(row["total_tokens"])].append((float(row["ratio"]), float(row["bits_per_value"])))
    return {form: dict(by_tokens) for form, by_tokens in found.items()}


if __name__ == "__main__":
    from turboattention.bench.result import read_csv

    for source in map(Path, sys.argv[1:]):
        print(*plot(read_csv([source]), source.with_suffix("")))
