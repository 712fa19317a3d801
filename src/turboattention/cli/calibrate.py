"""``turboattention calibrate``: the cheapest policy that meets a target, and a report of its safe zone."""

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from turboattention.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    check_device,
    check_outputs,
    progress_bar,
    to_json,
)
from turboattention.cli.requirements import require
from turboattention.files import write_atomic


def calibrate(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The policy file to write.")],
    model: ModelOption = "smollm2-135m",
    texts: Annotated[
        list[str] | None,
        typer.Option("--texts", metavar="FILE", help="UTF-8 text or a bundled text's name, repeatable; default: all."),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out", metavar="FILE", help="Text to report on, repeatable; default: the beginning of each text."
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="max-kl=NATS, max-ppl-increase=SHARE or bits=BITS.")
    ] = "max-kl=0.01",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of calibration text.")] = 8192,
    window: Annotated[int, typer.Option("--window", help="Tokens of one calibration window.")] = 1024,
    held_out_tokens: Annotated[int, typer.Option("--held-out-tokens", help="Tokens of each held-out text.")] = 1024,
    per: Annotated[
        Literal["head", "layer"], typer.Option("--per", help="What gets bits of its own; layer: equal pages in it.")
    ] = "head",
    probes: Annotated[
        int, typer.Option("--probes", min=0, help="Sensitivities that are also measured, to check the estimates.")
    ] = 12,
    needles: Annotated[
        int, typer.Option("--needles", min=0, help="Tokens of a retrieval test for the report; 0: none.")
    ] = 0,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="PATH", help="Also measure other sizes and presets, and write a page."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="PATH", help="Keep finished steps here; the same command goes on from it."),
    ] = None,
    seed: SeedOption = 0,
    json_path: JsonOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Find the cheapest cache that stays within a loss (or the best one of a size) and write it as a policy file."""
    require("transformers", "numpy", *(("jinja2", "matplotlib") if report else ()))
    check_outputs(out, json_path, report, state)
    check_device(device)

    from turboattention.calibration.calibrate import calibrate as find
    from turboattention.calibration.settings import Settings
    from turboattention.calibration.target import Target
    from turboattention.evaluation.texts import BUNDLED_TEXTS, load_text
    from turboattention.integrations.models import load_model
    from turboattention.report.calibration import print_calibration, render_calibration

    goal = Target.parse(target)
    settings = Settings(
        tokens=tokens, window=window, held_out_tokens=held_out_tokens, per=per, probes=probes, needles=needles,
        seed=seed, curve=report is not None,
    )  # fmt: skip
    chosen = list(texts or BUNDLED_TEXTS)
    for name in (*chosen, *(held_out or [])):
        load_text(name)
    with progress_bar("Loading the model") as progress:
        loaded = load_model(model, dtype=getattr(torch, dtype), device=device)
        found = find(loaded, chosen, goal, held_out or (), settings, state, progress)
    print_calibration(found.result, Console())
    found.policy.save(out)
    outputs = {}
    if json_path:
        outputs[json_path] = to_json(found.result.to_dict())
    if report:
        outputs[report] = render_calibration(found.result, str(context.obj))
    for path, content in outputs.items():
        write_atomic(path, content)
    for path in (out, *outputs):
        Console(stderr=True).print(f"wrote {path}", markup=False, highlight=False)
