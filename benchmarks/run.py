"""Measure the table of operators on this machine: rows to CSV, a table to the terminal, and a plot.

    python benchmarks/run.py --device cuda                       # everything, about 15 minutes on one GPU
    python benchmarks/run.py --device cuda --quick --only "decode 4 bits" --only prefill
    python benchmarks/run.py --device cpu --out benchmarks/results/operators_cpu.csv
    python benchmarks/run.py --only "decode 4 bits" --shape 8x32768 --shape 64x8192 --form turbo4 --peers

Each row holds the time, the fastest 16-bit attention of the same process, and the error. A wrong result has no speed.
The exit status is 1 when a row failed; rows that passed are kept.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).parent))
from cases import Entry, table
from cpu_cases import cpu_table
from peers import decode_peers, prefill_peers
from plot import plot

from turboattention.bench.machine import machine
from turboattention.bench.result import Row, append_csv
from turboattention.bench.run import measure_case
from turboattention.cli.bench import show
from turboattention.cli.options import check_device

RESULTS = Path(__file__).parent / "results"


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"groups to measure: {', '.join(table())}")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="only these, as sequences x tokens: 8x32768")] = None,
    form: Annotated[list[str] | None, typer.Option(help="only these stored forms, for example turbo4")] = None,
    out: Annotated[Path, typer.Option(help="CSV file to append to; names the plot")] = RESULTS / "operators.csv",
    quick: Annotated[bool, typer.Option("--quick", help="few shapes, few repeats")] = False,
    peers: Annotated[bool, typer.Option(help="measure other libraries where they are installed")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    seconds: Annotated[int, typer.Option(help="start no further case after this time")] = 3600,
) -> None:
    """Measure, append rows to OUT, print them and draw the plot."""
    check_device(device)
    place = torch.device(device)
    known = machine(place)
    begin = time.monotonic()
    groups: dict[str, list[Entry]] = table(quick) if place.type == "cuda" else cpu_table(quick)
    if unknown := set(only or ()) - groups.keys():
        raise typer.BadParameter(f"no group {', '.join(sorted(unknown))}; there are: {', '.join(groups)}")
    chosen = [e for name, entries in groups.items() if not only or name in only for e in entries]
    chosen = [e for e in chosen if not shape or f"{e.case.batch}x{e.case.tokens}" in shape]
    chosen = [e for e in chosen if not form or e.case.op == "prefill" or e.case.form in form]
    if not chosen:
        raise typer.BadParameter("no case of these groups has such a shape and form")
    rows: list[Row] = []
    for done, (case, against) in enumerate(chosen):
        if time.monotonic() - begin > seconds:
            print(
                f"stopped after {seconds} s: {len(chosen) - done} of {len(chosen)} cases not measured", file=sys.stderr
            )
            break
        others = peers and against == "16-bit"
        with torch.inference_mode():
            measured = measure_case(
                case, known, place, against=against, repeats=5 if quick else None,
                decode_peers=decode_peers() if others else (), prefill_peers=prefill_peers() if others else (),
            )  # fmt: skip
        append_csv(out, measured)
        rows += measured
        print(f"{done + 1}/{len(chosen)} {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        show(measured)
    show(rows)
    for path in plot([row.to_dict() for row in rows], out.with_suffix("")):
        print(f"wrote {path}", file=sys.stderr)
    # A peer's row is named after the peer alone; it may fail without consequence.
    if any(row.failure and row.implementation != row.preset for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
