"""Options that several verbs share, and the checks that run before a model is loaded."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from turboattention.config import DEFAULT_PRESET, get_preset, presets
from turboattention.errors import InvalidInputError, UnsupportedError, invalid
from turboattention.files import check_writable
from turboattention.policy import Policy
from turboattention.report.words import printable

ModelOption = Annotated[
    str,
    typer.Option("--model", metavar="NAME_OR_PATH", help="A known name, a folder or GGUF file, or a hub name."),
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Also write the result as JSON.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Type of weights and activations.")
]
DeviceOption = Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Where the model runs.")]
PRESET_HELP = f"One of: {', '.join(presets())}."


def examples(*commands: str) -> str:
    """An epilog that lists commands, one a line."""
    lines = "\n".join(f"  {command}" for command in commands)
    return f"\b\nExamples:\n{lines}"


def check_outputs(*paths: Path | None) -> None:
    """Raise unless every given path can be written and no two are the same file."""
    given = [path for path in paths if path is not None]
    for path in given:
        check_writable(path)
    if len({path.resolve() for path in given}) < len(given):
        raise invalid("output paths", "different files", ", ".join(map(str, given)))


def check_device(device: str) -> None:
    """Raise when ``device`` is not in this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("--device: expected a CUDA device, received none from PyTorch; use --device cpu")


def choose_policies(names: Sequence[str], files: Sequence[Path]) -> list[str | Policy]:
    """Presets by name (checked), then policy files (loaded); the default preset when nothing is chosen."""
    chosen = list(names) if names or files else [DEFAULT_PRESET]
    for name in chosen:
        get_preset(name)
    loaded = [Policy.load(file) for file in files]
    labels = chosen + [policy.name for policy in loaded]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise invalid("presets and policies", "each name once", ", ".join(twice), "drop one of them")
    return [*chosen, *loaded]


def to_json(data: dict[str, Any]) -> str:
    """JSON text; a number that is not finite is refused, because JSON has none."""
    try:
        return json.dumps(data, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise InvalidInputError(
            "result: expected finite numbers, received NaN or infinity; try --dtype float32 or another preset"
        ) from error


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr that goes when the work ends; gives ``progress(done, total, label)``."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def progress(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=printable(text))

        yield progress
