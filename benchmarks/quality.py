"""Quality and size of every preset and ablation on one model: the rows behind the tables of README and docs/decisions.

    python benchmarks/quality.py --model smollm2-135m --tokens 2048 --tokens 4096 --group presets --out results.csv

Each row: model, set, name, tokens of a window, bits per value, compression, added nats, KL and top-1 agreement with
their 95 % intervals, needles found. All positions are read through the quantised cache (docs/numerics.md).
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from turboattention.config import AttentionConfig, TensorFormat, get_preset, presets
from turboattention.evaluation.environment import environment
from turboattention.evaluation.retrieval import needle_score
from turboattention.evaluation.statistics import mean_interval, perplexity_interval
from turboattention.evaluation.stream import stream
from turboattention.evaluation.texts import BUNDLED_TEXTS, windows
from turboattention.integrations.models import load_model
from turboattention.policy import Policy
from turboattention.quant.granularity import PerChannel, PerToken

COLUMNS = (
    "model", "set", "name", "tokens", "windows", "bits_per_value", "compression", "perplexity_16bit", "perplexity",
    "added_nats", "added_nats_low", "added_nats_high", "kl", "kl_low", "kl_high", "top1", "top1_low", "top1_high",
    "needles", "needles_16bit", "needle_questions", "device", "torch", "transformers", "dtype",
)  # fmt: skip


def ablations() -> dict[str, Policy]:
    """From plain min-max codes to each preset, one step at a time, and what was tried beside it."""
    found: dict[str, Policy] = {}
    for bits in (4, 3, 2):
        turbo = Policy.from_preset(f"turbo{bits}")
        key, value = TensorFormat(bits, PerChannel()), TensorFormat(bits, PerToken())
        plain = replace(turbo, cache=replace(turbo.cache, key=key, value=value, sink_tokens=0))
        rotated = replace(plain.cache, value=turbo.cache.value, sink_tokens=1)
        searched = replace(rotated, key=replace(key, search=True))
        steps = {
            f"plain{bits}": plain.cache,
            f"plain{bits}, sink": replace(plain.cache, sink_tokens=1),
            f"plain{bits}, sink, rotated V": rotated,
            f"plain{bits}, sink, rotated V, searched K": searched,
            f"turbo{bits}, no sink": replace(turbo.cache, sink_tokens=0),
            f"turbo{bits}, 4 sinks": replace(turbo.cache, sink_tokens=4),
            f"turbo{bits}, window 32": replace(turbo.cache, recent_window=32),
            f"turbo{bits}, K per token, rotated": replace(turbo.cache, key=turbo.cache.value),
        }
        found |= {name: replace(turbo, name=name, cache=cache) for name, cache in steps.items()}
    turbo4 = Policy.from_preset("turbo4")
    for name, attention in (
        ("turbo4, base-2 softmax", AttentionConfig(softmax="base2")),
        ("turbo4, base-2 softmax, 8-bit P", AttentionConfig(softmax="base2", probability_bits=8)),
        ("turbo4, SAS", AttentionConfig(softmax="sas")),
    ):
        found[name] = replace(turbo4, name=name, attention=attention)
    paper4 = Policy.from_preset("paper4")
    found["paper4, exact softmax, 16-bit Q and P"] = replace(
        paper4, name="paper4, exact softmax, 16-bit Q and P", attention=get_preset("turbo4").attention
    )
    return found


def main(
    model: Annotated[str, typer.Option(help="a name that the command line knows, or a path")],
    out: Annotated[Path, typer.Option(help="CSV file to append to")],
    tokens: Annotated[list[int], typer.Option(help="tokens of a window; repeatable")],
    group: Annotated[str, typer.Option(help="presets or ablations")] = "presets",
    only: Annotated[list[str] | None, typer.Option(help="names of the group to measure; default all")] = None,
    needles: Annotated[int, typer.Option(help="context of the needle test; 0 leaves it out")] = 0,
    device: str = "cpu",
) -> None:
    """Measure and append rows to OUT."""
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32 here, or its noise hides the differences
    chosen = ablations() if group == "ablations" else {name: Policy.from_preset(name) for name in presets()}
    chosen = {name: policy for name, policy in chosen.items() if not only or name in only}
    loaded = load_model(model, dtype=torch.float32, device=device)
    found = {}
    if needles:
        for name, policy in {"16-bit": None, **chosen}.items():
            found[name] = needle_score(loaded.model, loaded.tokenizer, policy, length=needles)
            print(loaded.name, name, "needles", found[name].exact, file=sys.stderr, flush=True)
    machine = environment(loaded.model.dtype, loaded.model.device)
    fresh = not out.exists()
    with out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if fresh:
            writer.writeheader()
        for length in tokens:
            rows = windows(loaded.tokenizer, BUNDLED_TEXTS, length, loaded.context_length)
            baseline, candidates = stream(loaded.model, rows, list(chosen.values()))
            for name, measured in zip(chosen, candidates, strict=True):
                bits = 8 * measured.kv_bytes / measured.num_values
                row = {
                    "model": loaded.name, "set": group, "name": name, "tokens": length, "windows": len(rows),
                    "bits_per_value": f"{bits:.4f}", "compression": f"{16 / bits:.3f}",
                    "perplexity_16bit": f"{perplexity_interval(baseline.nll, 0)[0]:.4f}",
                    "perplexity": f"{perplexity_interval(measured.nll, 0)[0]:.4f}",
                    "device": machine.get("gpu") or machine.get("cpu"), "torch": torch.__version__,
                    "transformers": machine["packages"]["transformers"], "dtype": "float32",
                }  # fmt: skip
                for column, values in (
                    ("added_nats", measured.nll - baseline.nll), ("kl", measured.kl), ("top1", measured.same_top),
                ):  # fmt: skip
                    mean, interval = mean_interval(values, 0)
                    row |= {column: f"{mean:.5f}", f"{column}_low": f"{interval.low:.5f}",
                            f"{column}_high": f"{interval.high:.5f}"}  # fmt: skip
                if found:
                    row |= {"needles": f"{found[name].exact:.3f}", "needles_16bit": f"{found['16-bit'].exact:.3f}",
                            "needle_questions": found[name].questions}  # fmt: skip
                writer.writerow(row)
                file.flush()
                print(loaded.name, length, name, *(row[c] for c in ("bits_per_value", "added_nats", "kl", "top1")),
                      file=sys.stderr, flush=True)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
