"""What a watch measures when nothing is wrong: the figures behind its default limits (docs/monitoring.md).

    python benchmarks/watch_measures.py --model smollm2-135m --model qwen2.5-coder-0.5b \
        --preset turbo4 --preset turbo3 --preset turbo2 --out benchmarks/results/watch_measures.csv

Every head of every chunk of a bundled text is checked. A row for each layer: means over checks, rates over values.
"""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer

import turboattention as ta
from turboattention.evaluation.environment import environment
from turboattention.evaluation.texts import load_text
from turboattention.integrations.models import load_model
from turboattention.integrations.transformers import TurboCache
from turboattention.integrations.transformers_watch import watch
from turboattention.monitoring.settings import WatchSettings
from turboattention.monitoring.watcher import Watcher, measurements

COLUMNS = (
    "model", "preset", "layer", "checks", "relative_error", "kl", "key_clipped", "value_clipped", "key_saturated",
    "value_saturated", "text", "tokens", "chunk", "cpu", "torch", "dtype", "date",
)  # fmt: skip


def main(
    model: Annotated[list[str], typer.Option(help="repeatable")],
    preset: Annotated[list[str], typer.Option(help="repeatable")],
    out: Annotated[Path, typer.Option(help="CSV file to append to")],
    text: str = "persuasion",
    tokens: int = 1400,
    chunk: int = 100,
) -> None:
    """Measure and append rows to OUT."""
    for name in model:
        loaded = load_model(name)
        ids = loaded.tokenizer(load_text(text), return_tensors="pt").input_ids[:, :tokens]
        where = environment()
        for chosen in preset:
            sums: dict[tuple[int, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
            with ta.enable(loaded.model, chosen) as enabled, torch.inference_mode():
                watching = watch(enabled, WatchSettings(share=1.0, heads=10**6, memory_mib=4096), limits=[])
                _tell(watching.watcher, sums)
                cache = TurboCache(loaded.model.config, chosen)
                for part in ids.split(chunk, 1):
                    loaded.model(part, past_key_values=cache, logits_to_keep=1)
            rows = []
            for layer in sorted({layer for layer, _ in sums}):
                means = [sums[layer, measure][0] / (sums[layer, measure][1] or 1.0) for measure in COLUMNS[4:10]]
                rows.append((
                    name, chosen, layer, int(sums[layer, "kl"][2]), *(f"{x:.5f}" for x in means), text, tokens, chunk,
                    where["cpu"], torch.__version__, where["dtype"], where["date"],
                ))  # fmt: skip
            fresh = not out.exists()
            with out.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(([COLUMNS] if fresh else []) + rows)
            worst = [max(float(row[column]) for row in rows) for column in range(4, 8)]
            print(
                f"| {name}, `{chosen}` | {worst[0]:.3f} | {worst[1]:.3f} | {worst[2]:.1%} | {worst[3]:.1%} |",
                flush=True,
            )


def _tell(watcher: Watcher, sums: dict[tuple[int, str], list[float]]) -> None:
    """Add each check of ``watcher`` to ``sums``: total, what to divide it by, checks."""
    check = watcher.check

    def told(*arguments: object, **more: object) -> object:
        found = check(*arguments, **more)  # type: ignore[arg-type]
        for measure, total, weight in [] if found is None else measurements(found):
            entry = sums[found.layer, measure]  # type: ignore[union-attr]  # None has no measurements
            for i, number in enumerate((total, weight, 1.0)):
                entry[i] += number
        return found

    watcher.check = told  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    typer.run(main)
