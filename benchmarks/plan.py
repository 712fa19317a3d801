"""The numbers of the planner from this project's rows, and its predictions beside what vLLM did.

    python benchmarks/plan.py fit        # writes src/turboattention/planning/calibration.json
    python benchmarks/plan.py compare    # prints the table of docs/planning.md

Of rows of the same case the newest counts.
"""

import argparse
import csv
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from turboattention.planning.calibration import Calibration, Fit, load_calibration
from turboattention.planning.gpu import Gpu, load_gpus
from turboattention.planning.kv_bytes import BF16, FP8, Form, all_forms, read_bytes, sequence_bytes
from turboattention.planning.model import ModelFacts, read_model
from turboattention.planning.roofline import decode_step, exchange_bytes, prompt_flops, prompt_seconds

sys.path.insert(0, str(Path(__file__).parent))
from vllm_serving import OUTPUT, llama

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "src" / "turboattention" / "planning" / "calibration.json"
GPU = "H100"  # the card whose rows give the numbers, but for the rest of a layer, FP8 and several cards
SERVED_ROWS = {GPU: ("vllm_h100.csv",), "H200": ("vllm_h200.csv", "vllm_h200x2.csv")}
MEMORY_SHARE = 0.6  # what benchmarks/vllm_serving.py gives to vLLM
# In rows of our pages older than this each step waited for the card, a fault since mended: they are left out.
MENDED = "2026-11-25T15:00"
SHORT = 1024  # tokens of a prompt, below which the host decides
PAGES = {"turbo4": "turbo_int4", "turbo4-v2": "turbo_k4v2", "turbo2": "turbo_int2"}  # stored forms of `bench`
SERVED = {"auto": "bf16", "fp8": "fp8", **{dtype: dtype for dtype in PAGES.values()}}


def read(name: str) -> list[dict[str, str]]:
    """Rows that did not fail."""
    with (RESULTS / name).open(newline="") as file:
        return [row for row in csv.DictReader(file) if not row["failure"]]


def newest(rows: Iterable[dict[str, str]], *case: str) -> list[dict[str, str]]:
    """The last row of each case."""
    found = {tuple(row[key] for key in case): row for row in sorted(rows, key=lambda row: row["date"])}
    return list(found.values())


def serving_rows(gpu: str = GPU) -> list[dict[str, str]]:
    """Rows of caches that are planned, with graphs and without a watch, the newest of each case; `fill` has no step."""
    found = []
    for name in SERVED_ROWS[gpu]:
        rows = [row | {"file": name} for row in read(name) if row["graphs"] == "True" and row["tpot_ms"]]
        rows = [row for row in rows if row["kv"] in SERVED and not row["watch"]]
        rows = [row for row in rows if row["kv"] in ("auto", "fp8") or row["date"] >= MENDED]
        found += newest(rows, "kv", "layers", "requests", "prompt_tokens")
    return found


def measured_ms(row: dict[str, str]) -> float:
    """Time of a decode step; of an output token in rows without steps, the first run left out: it compiles."""
    if row["step_ms"]:
        return float(row["step_ms"])
    runs = [float(x) for x in row["tpot_all_ms"].split()]
    return statistics.median(runs[1:] or runs)


def noise_ms(row: dict[str, str]) -> float:
    """What a single run can be off by.

    A step is the difference of two jobs, each of which varies by 0.3 %, as ``prefill_all`` shows.
    """
    if row["runs"] != "1" or not row["step_ms"]:
        return 0.0
    job = int(row["requests"]) * int(row["prompt_tokens"]) / float(row["prefill_tokens_per_s"])
    return math.sqrt(2) * 0.003 * job / (OUTPUT - 1) * 1e3


def shape(row: dict[str, str]) -> ModelFacts:
    """What a card of a row of `vllm_serving.py` has of its model."""
    return whole_model(int(row["layers"])).split(int(row.get("ranks") or 1))


@lru_cache
def whole_model(layers: int) -> ModelFacts:
    """The model of `vllm_serving.py`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(llama(layers)))
        return read_model(folder)


def middle(row: dict[str, str]) -> int:
    """Tokens of a sequence in the middle of what `measured_ms` measured."""
    return int(row["prompt_tokens"]) + OUTPUT // 2 + (OUTPUT if row["step_ms"] else 0)


def line(points: list[tuple[float, float]], bandwidth: float) -> Fit:
    """Least squares of relative errors: seconds = latency + bytes / bandwidth."""
    # Weights 1/t make every point count by its relative error; 2 x 2 normal equations.
    saa = sum(1 / t**2 for _, t in points)
    sab = sum(n / t**2 for n, t in points)
    sbb = sum((n / t) ** 2 for n, t in points)
    sa, sb = sum(1 / t for _, t in points), sum(n / t for n, t in points)
    det = saa * sbb - sab**2
    latency, slope = (sa * sbb - sb * sab) / det, (saa * sb - sab * sa) / det
    return Fit(round(latency * 1e6, 2), round(1 / slope / bandwidth, 4), len(points))


def fit() -> dict[str, Any]:
    """All numbers."""
    gpu = load_gpus()[GPU]
    rows = [row for row in read("operators_h100.csv") if row["op"] == "decode" and row["ragged"] == "False"]
    ours = newest((r for r in rows if r["implementation"] == "gluon" and r["name"] != "decode page order"),
                  "preset", "batch", "tokens")  # fmt: skip
    attention = {}
    sixteen = [(float(r["total_tokens"]) * 4 * int(r["kv_heads"]) * int(r["head_dim"]), float(r["baseline_ms"]) / 1e3)
               for r in ours]  # fmt: skip
    attention["bf16"] = attention["fp8"] = line(sixteen, gpu.bandwidth)
    for stored, name in PAGES.items():
        points = [(float(r["bytes_per_s"]) * float(r["candidate_ms"]) / 1e3, float(r["candidate_ms"]) / 1e3)
                  for r in ours if r["preset"] == stored and int(r["tokens"]) > SHORT]  # fmt: skip
        attention[name] = line(points, gpu.bandwidth)
    short = [r for r in ours if r["preset"] == "turbo4" and int(r["tokens"]) <= SHORT]
    unit = statistics.mean((float(r["candidate_ms"]) * 1e3 - attention["turbo_int4"].latency_us)
                           / (int(r["batch"]) * int(r["kv_heads"])) for r in short)  # fmt: skip
    append = newest((r for r in read("operators_h100.csv") if r["op"] == "append"), "batch", "tokens")
    append_us = statistics.mean(float(r["candidate_ms"]) * 1e3 for r in append)
    plain = {form.name: form for form in (BF16, FP8)}

    # vLLM's own caches alone: the rows of our pages are there to test the prediction.
    gpus = load_gpus()
    every = [(gpus[name], r) for name in SERVED_ROWS for r in serving_rows(name)
             if SERVED[r["kv"]] in plain and int(r["prompt_tokens"]) >= SHORT]  # fmt: skip
    served, shared = ([(card, r) for card, r in every if (shape(r).ranks > 1) == several] for several in (False, True))
    long = [r for card, r in served if card.name == GPU]
    # The fastest step of any cache on any card: at 2, 3 and 4 bits steps take as long, so that it is not the card's.
    fastest = min((r for name in SERVED_ROWS for r in serving_rows(name)), key=measured_ms)
    start = Calibration(GPU, attention, unit, append_us, 0.0, 0.0, 1.0, 0.0, 1.0, 0, 0, ())
    prefill = statistics.mean(
        prompt_flops(shape(r), int(r["prompt_tokens"])) / int(r["prompt_tokens"])
        * float(r["prefill_tokens_per_s"]) / (gpu.dense_tflops or 0) / 1e12 for r in long
    )  # fmt: skip
    layer = statistics.mean(missing_us(r, BF16, card, start) for card, r in served if r["kv"] == "auto")
    attention["fp8"] = replace(attention["fp8"], flops_per_value=round(statistics.mean(
        flops_per_value(r, card, replace(start, layer_us=layer)) for card, r in served if r["kv"] == "fp8"
    ), 1))  # fmt: skip
    alone = replace(start, layer_us=layer, prefill_share=prefill, link_share=math.inf)
    link = 1 / statistics.mean(slowness(r, card, alone) for card, r in shared)
    alone = replace(alone, link_share=link)
    exchange = statistics.mean(missing_us(r, plain[SERVED[r["kv"]]], card, alone) / 2 for card, r in shared)
    reserve = statistics.mean(left(r, gpu, plain[SERVED[r["kv"]]]) for r in long)
    more = statistics.mean(left(r, card, plain[SERVED[r["kv"]]]) for card, r in shared) - reserve
    sources = [f"benchmarks/results/operators_h100.csv: {len(ours)} decode and {len(append)} append rows"]
    sources += [f"benchmarks/results/{r['file']}: kv {r['kv']}, {r['layers']} layers, {r['requests']} requests of "
                f"{r['prompt_tokens']} tokens, {r['date']}" for _, r in every]  # fmt: skip
    sources.append(f"the host: kv {fastest['kv']}, {fastest['layers']} layers, {fastest['device']}, {fastest['date']}")
    return asdict(Calibration(
        GPU, attention, round(unit, 4), round(append_us, 2), round(layer, 1), round(measured_ms(fastest), 2),
        round(prefill, 3), round(exchange, 2), round(link, 3), round(more), round(reserve),
        tuple(sources),
    ))  # fmt: skip


def missing_us(row: dict[str, str], form: Form, gpu: Gpu, calibration: Calibration) -> float:
    """What a layer takes beyond the prediction."""
    model = shape(row)
    return (measured_ms(row) - predicted(form, model, gpu, calibration, row)) * 1e3 / model.layers


def flops_per_value(row: dict[str, str], gpu: Gpu, calibration: Calibration) -> float:
    """Dense operations that pass for each value of an FP8 cache, beyond the latency of attention."""
    model = shape(row)
    nothing = Fit(0.0, math.inf, 0)
    attention = {**calibration.attention, FP8.name: nothing}
    seconds = missing_us(row, FP8, gpu, replace(calibration, attention=attention)) / 1e6
    values = int(row["requests"]) * read_bytes(FP8, model, middle(row), None)  # a byte each
    seconds -= calibration.attention[FP8.name].latency_us / 1e6
    return seconds * (gpu.dense_tflops or 0) * 1e12 / values


def slowness(row: dict[str, str], gpu: Gpu, calibration: Calibration) -> float:
    """The link's data-sheet speed over that of the exchanges in a prompt."""
    model, tokens = shape(row), int(row["prompt_tokens"])
    seconds = tokens / float(row["prefill_tokens_per_s"]) - prompt_seconds(model, gpu, calibration, tokens)
    sent = 2 * model.layers * exchange_bytes(model, tokens)
    return seconds * (gpu.link_gbs or 0) * 1e9 / sent


def left(row: dict[str, str], gpu: Gpu, form: Form) -> float:
    """Memory that vLLM gave neither to weights nor to the cache."""
    model = shape(row)
    tokens = int(row["kv_tokens"])
    return gpu.memory_bytes * MEMORY_SHARE - 2 * model.parameters - sequence_bytes(form, model, tokens)


def predicted(form: Form, model: ModelFacts, gpu: Gpu, calibration: Calibration, row: dict[str, str]) -> float:
    """Milliseconds of an output token."""
    return decode_step(form, model, gpu, calibration, int(row["requests"]), middle(row), 16).ms


def comparison() -> list[dict[str, Any]]:
    """Predictions beside vLLM's rows: time of an output token, prompt tokens a second, tokens that fit."""
    calibration, gpus = load_calibration(), load_gpus()
    forms = {form.name: form for form in all_forms() if form.serves}
    cases = [(gpus[name], row) for name in SERVED_ROWS for row in serving_rows(name)]
    # An engine that gave two rows, one of fewer and longer requests (`--long`), keeps open pages for the more.
    most: dict[tuple[str, str], int] = {}
    for _, row in cases:
        engine = row["kv"], row["date"]
        most[engine] = max(most.get(engine, 0), int(row["requests"]))
    found = []
    for gpu, row in cases:
        form, model = forms[SERVED[row["kv"]]], shape(row)
        tokens, requests = int(row["prompt_tokens"]), int(row["requests"])
        one, two = (sequence_bytes(form, model, n * 6400) for n in (1, 2))
        room = gpu.memory_bytes * MEMORY_SHARE - 2 * model.parameters - calibration.reserved(model.ranks)
        # Open pages are taken beforehand, a row for each request and one for padding.
        fixed = (2 * one - two) * (most[row["kv"], row["date"]] + 1)
        found.append({
            "gpu": gpu.name, "cards": model.ranks, "form": form.name, "layers": model.layers, "requests": requests,
            "tokens": tokens, "date": row["date"], "noise_ms": noise_ms(row), "ms": measured_ms(row),
            "predicted_ms": predicted(form, model, gpu, calibration, row),
            # Short prompts all at once are another measurement: the host and launches, not compute.
            "prefill": float(row["prefill_tokens_per_s"]) if tokens >= SHORT else None,
            "predicted_prefill": tokens / prompt_seconds(model, gpu, calibration, tokens),
            "fits": int(row["kv_tokens"]), "predicted_fits": (room - fixed) / ((two - one) / 6400),
        })  # fmt: skip
    return found


def compare() -> None:
    """Print the table of the docs."""
    heads = ("card", "cache", "layers, requests, prompt", "ms a step: measured, predicted", "prompt tokens/s",
             "tokens that fit")  # fmt: skip
    print("| " + " | ".join(heads) + " |")
    print("|---|---|---|---|---|---|")
    for x in comparison():
        cells = ["-" if a is None else f"{a:{form}}, {b:{form}} ({b / a - 1:+.0%})" for a, b, form in (
            (x["ms"], x["predicted_ms"], ".2f"), (x["prefill"], x["predicted_prefill"], ",.0f"),
            (x["fits"], x["predicted_fits"], ",.0f"),
        )]  # fmt: skip
        case = f"{x['layers']}, {x['requests']}, {x['tokens']:,}"
        card = f"{x['cards']} x {x['gpu']}" if x["cards"] > 1 else x["gpu"]
        print(f"| {card} | `{x['form']}` | {case} | " + " | ".join(cells) + " |")


def main() -> int:
    """Run one of the verbs of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("fit", "compare"))
    if parser.parse_args().verb == "fit":
        TARGET.write_text(json.dumps(fit(), indent=2) + "\n")
        print(f"wrote {TARGET.relative_to(ROOT)}")
    else:
        compare()
    return 0


if __name__ == "__main__":
    sys.exit(main())
