"""One row of a benchmark, ready for JSON and CSV."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from turboattention.bench.case import Case

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """A measured case. Times in milliseconds of one call; a row with a ``failure`` has none of them.

    total_tokens: over the batch. bits_per_value: of everything the operator reads, exact tokens included.
    baseline, baseline_ms: the fastest of the compared ones, ``compared`` lists all with their times.
    ratio: baseline_ms / candidate_ms. p10, p90: of the repeats. quantisation_ms: part of candidate_ms.
    bytes_per_s: bytes read by the candidate over its time; share_of_bandwidth: the time of a kernel that only reads the
    same bytes over its time.
    error_rms: relative RMS against float64 on the dequantised values, the larger of peaked and flat attention;
    error_limit: what it may be. error_exact: the same against float64 on the 16-bit values: the error of the codes on
    synthetic data, which says nothing about a model.
    """

    name: str
    op: str
    device: str
    torch: str
    triton: str | None
    turboattention: str
    driver: str | None
    query_heads: int
    kv_heads: int
    head_dim: int
    batch: int
    tokens: int
    total_tokens: int
    causal: bool | None
    page_order: str | None
    ragged: bool
    preset: str
    implementation: str
    bits_per_value: float | None = None
    baseline: str | None = None
    baseline_ms: float | None = None
    baseline_p10_ms: float | None = None
    baseline_p90_ms: float | None = None
    candidate_ms: float | None = None
    candidate_p10_ms: float | None = None
    candidate_p90_ms: float | None = None
    ratio: float | None = None
    quantisation_ms: float | None = None
    bytes_per_s: float | None = None
    share_of_bandwidth: float | None = None
    error_rms: float | None = None
    error_limit: float | None = None
    error_exact: float | None = None
    sm_clock_mhz: int | None = None
    compared: str = ""
    date: str = ""
    failure: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


COLUMNS = tuple(field.name for field in fields(Row))
_SPEEDS = (
    "baseline_ms", "baseline_p10_ms", "baseline_p90_ms", "candidate_ms", "candidate_p10_ms", "candidate_p90_ms",
    "ratio", "quantisation_ms", "bytes_per_s", "share_of_bandwidth",
)  # fmt: skip


def new_row(case: Case, machine: dict[str, Any], implementation: str) -> Row:
    """The columns that are known before anything ran."""
    paged = case.op != "prefill"
    return Row(
        case.name, case.op, machine["device"], machine["torch"], machine["triton"], machine["turboattention"],
        machine["driver"], case.query_heads, case.kv_heads, case.head_dim, case.batch, case.tokens, case.total_tokens,
        None if paged else case.causal, case.order if paged else None, case.ragged,
        case.form if paged else "int8 chunk", implementation, date=machine["date"],
    )  # fmt: skip


def failed(row: Row, reason: str) -> Row:
    """``row`` without any speed: a wrong result has none."""
    none: dict[str, Any] = dict.fromkeys(_SPEEDS)
    return replace(row, failure=" ".join(reason.split()), **none)


def append_csv(path: Path, rows: Sequence[Row]) -> None:
    """Append rows, with a header when the file is new."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator=os.linesep)
        if fresh:
            writer.writeheader()
        writer.writerows({k: _written(v) for k, v in row.to_dict().items()} for row in rows)


def read_csv(paths: Iterable[Path]) -> list[dict[str, str]]:
    """Rows of files that `append_csv` wrote."""
    found = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            found += list(csv.DictReader(file))
    return found


def _written(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
