"""The README's quality table from rows of `benchmarks/quality.py`.

python benchmarks/table.py benchmarks/results/quality_h200.csv benchmarks/results/quality_cpu.csv
"""

import csv
from pathlib import Path

import typer

from turboattention.config import presets


def main(files: list[Path], tokens: int = 2048) -> None:
    """Print Markdown; of several rows for the same preset and model the last one counts."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    needles: dict[tuple[str, str], str] = {}
    for path in files:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                name = row["name"].split(",")[0]
                if row["tokens"] != str(tokens) or name not in presets():
                    continue
                if row["needles"]:
                    needles[row["model"], name] = row["needles"]
                if row["set"] == "presets":
                    rows[row["model"], name] = row
    models = list(dict.fromkeys(model for model, _ in rows))
    titles = [f"{model}: bits, added nats, KL, same top token, needles" for model in models]
    print("| preset | " + " | ".join(titles) + " |\n|---|" + "---|" * len(models))
    for name in presets():
        if name == "fp16":
            continue  # the cache of a float32 run holds float32; its difference is zero
        cells = []
        for model in models:
            row = rows[model, name]
            figures = (
                f"{float(row['bits_per_value']):.2f}",
                f"{float(row['added_nats']):+.4f}",
                f"**{float(row['kl']):.4f}**",
                f"{100 * float(row['top1']):.1f} %",
                f"{100 * float(needles[model, name]):.0f} %",
            )
            cells.append(", ".join(figures))
        print(f"| `{name}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
