"""Calibrated policies beside presets on held-out text: the rows behind docs/calibration.md.

    python benchmarks/calibration.py --model smollm2-135m --target max-kl=0.005 --target bits=3.25 \
        --held-out-tokens 4096 --out benchmarks/results/calibration.csv

    python benchmarks/calibration.py --model smollm2-135m --bits 2.5 --bits 3.25 --preset turbo3 --out FILE

The first form tunes each target as `turboattention calibrate` does; the second measures sizes in one pass, untuned. One
row for each policy that was measured; presets and other sizes once for a model. With --state all targets share the
sensitivities, and a run that was stopped goes on. --needles asks the sizes for codes hidden in so many tokens of text.
"""

import csv
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from turboattention.calibration.allocate import Frontier, loss_of, options
from turboattention.calibration.calibrate import calibrate, sensitivities
from turboattention.calibration.levels import policy_of
from turboattention.calibration.result import CalibrationResult, Kind, Point
from turboattention.calibration.safe_zone import OTHER_PRESETS
from turboattention.calibration.session import Session
from turboattention.calibration.settings import Settings
from turboattention.calibration.tune import size_of_bits
from turboattention.evaluation.environment import environment
from turboattention.evaluation.retrieval import RetrievalResult, needle_score
from turboattention.evaluation.texts import BUNDLED_TEXTS
from turboattention.integrations.models import load_model
from turboattention.policy import Policy

COLUMNS = (
    "model", "kind", "name", "per", "bits_per_value", "kl", "kl_low", "kl_high", "added_nats", "added_nats_low",
    "added_nats_high", "top1", "within_target", "predicted_kl", "tuning_kl", "tokens", "window", "held_out",
    "held_out_tokens", "seed", "spearman", "probes", "seconds_sensitivities", "seconds_probes", "seconds_tuning",
    "device", "torch", "transformers", "dtype", "needles", "needles_16bit", "needle_questions",
)  # fmt: skip


def main(
    model: Annotated[str, typer.Option(help="a name that the command line knows, or a path")],
    out: Annotated[Path, typer.Option(help="CSV file to append to")],
    target: Annotated[list[str] | None, typer.Option(help="as of turboattention calibrate; repeatable")] = None,
    bits: Annotated[list[float] | None, typer.Option(help="sizes to measure together, untuned; repeatable")] = None,
    preset: Annotated[list[str] | None, typer.Option(help="presets to measure with them; repeatable")] = None,
    measured_tokens: Annotated[int, typer.Option(help="with --bits: of each held-out window, the first; 0: all")] = 0,
    needles: Annotated[int, typer.Option(help="with --bits: tokens of a retrieval test; 0: none")] = 0,
    tokens: int = 8192,
    window: int = 1024,
    held_out_tokens: int = 1024,
    per: str = "head",
    probes: int = 12,
    curve: Annotated[bool, typer.Option(help="other sizes, paper's rule, the paper's presets and KIVI too")] = True,
    seed: int = 0,
    state: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
) -> None:
    """Calibrate for each target and append rows to OUT."""
    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = load_model(model, dtype=getattr(torch, dtype), device=device)
    settings = Settings(tokens, window, held_out_tokens, per, probes, curve, 0, seed)  # type: ignore[arg-type]
    fresh = not out.exists() or not out.stat().st_size
    with out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if fresh:
            writer.writeheader()
        if bits:
            session = Session(loaded, BUNDLED_TEXTS, (), settings, state, _say)
            writer.writerows(_sizes(session, bits, preset or [], measured_tokens, needles))
            file.flush()
        written: set[str] = set()
        for goal in target or []:
            result = calibrate(loaded, target=goal, settings=settings, state=state, progress=_say).result
            for point in result.points:
                if point.name not in written:
                    writer.writerow(_row(result, point, window))
                    written.add(point.name)
            file.flush()
            print(goal, result.chosen.bits_per_value, result.chosen.kl, result.seconds, file=sys.stderr, flush=True)


def _sizes(
    session: Session, bits: list[float], presets: list[str], measured_tokens: int, needles: int
) -> list[dict[str, Any]]:
    """Rows of the same allocation at several sizes and of presets, in one pass over the held-out text."""
    table, _ = sensitivities(session)
    frontier = Frontier(options(table, session.shape, session.settings.per))
    policies: list[tuple[Kind, Policy]] = []
    found: dict[str, RetrievalResult] = {}
    for size in bits:
        choice = frontier.choose(size_of_bits(session, frontier, size))
        policies.append(("calibrated", policy_of(f"calibrated {size:g}", choice, session.shape)))
        print(size, "predicted KL", loss_of(choice, table), file=sys.stderr, flush=True)
    if needles:
        model, tokenizer = session.model, session.loaded.tokenizer
        exact = needle_score(model, tokenizer, None, needles)
        found = {policy.name: needle_score(model, tokenizer, policy, needles) for _, policy in policies}
    kinds: dict[str, Kind] = {name: kind for kind, name in OTHER_PRESETS}
    policies += [(kinds.get(name, "uniform"), Policy.from_preset(name)) for name in presets]
    tokens = measured_tokens or session.settings.held_out_tokens
    rows = session.plan.held_out[:, : tokens + 1]
    points = session.measured(f"first {tokens} held-out tokens", rows, session.plan.held_out_names, policies)
    read = (len(session.plan.sensitivity) + len(session.plan.tuning)) * session.settings.window
    shared = {
        "model": session.loaded.name, "held_out": " ".join(session.plan.held_out_names), "held_out_tokens": tokens,
        **_machine(environment(session.model.dtype, session.model.device)),
    }  # fmt: skip
    ours = {"per": session.settings.per, "tokens": read, "window": session.settings.window,
            "seed": session.settings.seed}  # fmt: skip
    rows_of = [shared | (ours if point.kind == "calibrated" else {}) | _numbers(point) for point in points]
    for row in rows_of:
        if score := found.get(row["name"]):
            row |= {"needles": f"{score.exact:.3f}", "needles_16bit": f"{exact.exact:.3f}",
                    "needle_questions": score.questions}  # fmt: skip
    return rows_of


def _machine(machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "device": machine.get("gpu") or machine.get("cpu"), "torch": machine["packages"]["torch"],
        "transformers": machine["packages"]["transformers"], "dtype": machine["dtype"],
    }  # fmt: skip


def _numbers(point: Point) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": point.kind, "name": point.name, "bits_per_value": f"{point.bits_per_value:.4f}",
                           "top1": f"{point.top1_agreement:.5f}"}  # fmt: skip
    for name in ("kl", "added_nats"):
        mean, interval = getattr(point, name), getattr(point, f"{name}_ci")
        row |= {name: f"{mean:.6f}", f"{name}_low": f"{interval.low:.6f}", f"{name}_high": f"{interval.high:.6f}"}
    return row


def _row(result: CalibrationResult, point: Point, window: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": result.model, "held_out": " ".join(result.held_out), "held_out_tokens": result.held_out_tokens,
        **_machine(result.environment), **_numbers(point),
    }  # fmt: skip
    if point.kind in ("chosen", "calibrated", "rule"):
        row |= {"per": result.per, "tokens": result.tokens, "window": window, "seed": result.seed}
    if point.kind == "chosen":
        row |= {
            "within_target": result.within_target, "predicted_kl": f"{result.predicted_kl:.6f}",
            "tuning_kl": f"{result.tuning.kl:.6f}", "probes": len(result.probes),
            "spearman": "" if result.spearman is None else f"{result.spearman:.4f}",
        }  # fmt: skip
        row |= {f"seconds_{x}": f"{result.seconds.get(x, 0.0):.0f}" for x in ("sensitivities", "probes", "tuning")}
    return row


def _say(done: int, total: int, label: str) -> None:
    if done % 50 == 0:
        print(f"{label} {done}/{total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
