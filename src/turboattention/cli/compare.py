"""``turboattention compare``: 16-bit against compressed caches on a model and texts."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from turboattention.cli.options import (
    PRESET_HELP,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    check_device,
    check_outputs,
    choose_policies,
    progress_bar,
    to_json,
)
from turboattention.cli.requirements import require
from turboattention.config import DEFAULT_PRESET
from turboattention.errors import invalid
from turboattention.files import write_atomic


def compare(
    context: typer.Context,
    model: ModelOption = "smollm2-135m",
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="FILE", help="UTF-8 text or a bundled text's name, repeatable; default: all bundled."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of each text.")] = 2048,
    preset: Annotated[
        list[str] | None,
        typer.Option("--preset", metavar="PRESET", help=f"{PRESET_HELP} Repeatable; default: {DEFAULT_PRESET}."),
    ] = None,
    policy: Annotated[
        list[Path] | None, typer.Option("--policy", metavar="FILE", help="Policy file, repeatable.")
    ] = None,
    seed: SeedOption = 0,
    json_path: JsonOption = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", metavar="PATH", help="Also write a page with plots and explanations.")
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Compare a compressed cache with the 16-bit cache: bytes, quality, speed, and the texts that the model writes."""
    require("transformers", *(("jinja2", "matplotlib") if html_path else ()))
    policies = choose_policies(preset or [], policy or [])
    check_outputs(json_path, html_path)
    check_device(device)

    from turboattention.evaluation.compare import LEAST_TOKENS
    from turboattention.evaluation.compare import compare as measure
    from turboattention.evaluation.texts import BUNDLED_TEXTS, load_text
    from turboattention.integrations.models import load_model
    from turboattention.report.terminal import print_comparison

    if tokens < LEAST_TOKENS:
        raise invalid("--tokens", f"at least {LEAST_TOKENS}", tokens)
    texts = list(text or BUNDLED_TEXTS)
    for name in texts:
        load_text(name)
    with progress_bar("Loading the model") as progress:
        loaded = load_model(model, dtype=getattr(torch, dtype), device=device)
        result = measure(loaded, texts, policies, tokens=tokens, seed=seed, progress=progress)
    outputs = {}
    if json_path:
        outputs[json_path] = to_json(result.to_dict())
    if html_path:
        from turboattention.report.html import render_html

        outputs[html_path] = render_html(result, command=str(context.obj))
    print_comparison(result, Console())
    for path, content in outputs.items():
        write_atomic(path, content)
        Console(stderr=True).print(f"wrote {path}", markup=False, highlight=False)
