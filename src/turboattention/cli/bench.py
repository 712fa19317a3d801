"""``turboattention bench``: time and error of one operator against the fastest 16-bit attention of this machine."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from turboattention.bench.case import Case, forms
from turboattention.bench.machine import machine
from turboattention.bench.result import SCHEMA, Row
from turboattention.cli.options import DeviceOption, JsonOption, check_device, check_outputs, to_json
from turboattention.config import DEFAULT_PRESET
from turboattention.files import write_atomic
from turboattention.report.figures import small

ROW_FAILED = 1
WIDTH = 180  # of a table in a file or a pipe


def bench(
    op: Annotated[Literal["append", "decode", "prefill"], typer.Argument(help="The operator.")],
    query_heads: Annotated[int, typer.Option("--query-heads", help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option("--kv-heads", help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option("--head-dim", help="Channels of a head.")] = 128,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of each sequence, or of the longest.")] = 8192,
    batch: Annotated[int, typer.Option("--batch", help="Sequences.")] = 1,
    preset: Annotated[
        str, typer.Option("--preset", metavar="PRESET", help=f"Stored form: {', '.join(forms())}. Prefill has none.")
    ] = DEFAULT_PRESET,
    causal: Annotated[bool, typer.Option("--causal/--no-causal", help="Prefill: a token sees no later one.")] = True,
    paged: Annotated[
        bool, typer.Option("--paged/--contiguous", help="Pages in random order in the pool, or in order.")
    ] = True,
    ragged: Annotated[bool, typer.Option("--ragged/--even", help="Lengths from 100 tokens up, or all alike.")] = False,
    implementation: Annotated[
        str | None,
        typer.Option("--implementation", help="reference, triton, gluon; default: what fits this machine."),
    ] = None,
    json_path: JsonOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Time an operator, with its error beside it. A wrong result has no speed: exit status 1."""
    check_outputs(json_path)
    check_device(device)
    case = Case(
        op, query_heads, kv_heads, head_dim, batch, tokens, preset, causal, "random" if paged else "contiguous", ragged,
        implementation,
    )  # fmt: skip
    place = torch.device(device)
    known = machine(place)
    from turboattention.bench.run import measure_case

    with torch.inference_mode():
        rows = measure_case(case, known, place)
    if json_path:
        result = {"schema": SCHEMA, "environment": known["environment"], "rows": [row.to_dict() for row in rows]}
        write_atomic(json_path, to_json(result))
    show(rows)
    if any(row.failure for row in rows):
        raise typer.Exit(ROW_FAILED)


def show(rows: Sequence[Row]) -> None:
    """Print rows as a table, and the reasons of those that failed."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    names = ("case", "implementation", "ms", "baseline", "ms", "ratio", "bandwidth", "error", "limit")
    table = Table(*names, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table, markup=False)
    for row in rows:
        if row.failure:
            console.print(f"FAILED: {title(row)}: {row.failure}", markup=False, highlight=False)


def title(row: Row) -> str:
    """A row in a few words."""
    kind = " ragged" if row.ragged else ""
    causal = "" if row.causal is None else " causal" if row.causal else " not causal"
    shape = f"{row.batch}x{row.tokens}{kind}{causal} {row.query_heads}/{row.kv_heads}x{row.head_dim}"
    return f"{row.op} {row.preset} {shape}"


def cells(row: Row) -> tuple[str, ...]:
    """What `show` writes of a row."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        title(row),
        row.implementation,
        number(row.candidate_ms, ".4g"),
        row.baseline or "",
        number(row.baseline_ms, ".4g"),
        number(row.ratio, ".2f"),
        number(row.share_of_bandwidth, ".0%"),
        "" if row.error_rms is None else small(row.error_rms),
        "" if row.error_limit is None else small(row.error_limit),
    )
