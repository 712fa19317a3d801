"""Rows of small cases on the CPU: complete, consistent, and without a speed when the result is wrong."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from turboattention.bench import adapters
from turboattention.bench.baselines import DecodeBaseline, PrefillBaseline
from turboattention.bench.case import Case
from turboattention.bench.data import Cache16
from turboattention.bench.machine import machine
from turboattention.bench.result import COLUMNS, Row, append_csv, read_csv
from turboattention.bench.run import measure_case
from turboattention.errors import InvalidInputError, UnsupportedError

CPU = torch.device("cpu")
SMALL = Case("decode", query_heads=6, kv_heads=2, head_dim=64, batch=2, tokens=333)
SPEEDS = ("baseline_ms", "candidate_ms", "ratio", "bytes_per_s", "share_of_bandwidth", "quantisation_ms")


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return machine(CPU)


def check_speeds(row: Row) -> None:
    assert row.failure == ""
    assert row.baseline_ms is not None
    assert row.candidate_ms is not None
    assert row.ratio == pytest.approx(row.baseline_ms / row.candidate_ms)
    assert row.baseline_p10_ms <= row.baseline_ms <= row.baseline_p90_ms
    assert row.candidate_p10_ms <= row.candidate_ms <= row.candidate_p90_ms


@pytest.mark.usefixtures("decode_by_definition")
@pytest.mark.parametrize("form", ["turbo4", "turbo2", "turbo4-unrefined", "turbo4-v2", "int8", "kivi4"])
@pytest.mark.parametrize("ragged", [False, True])
def test_decode_row(known: dict[str, Any], form: str, ragged: bool) -> None:
    (row,) = measure_case(replace(SMALL, form=form, ragged=ragged, tokens=515), known, CPU, repeats=3)
    check_speeds(row)
    assert row.baseline.startswith("SDPA")
    assert ("needs sequences of one length" in row.compared) == ragged
    assert row.error_rms is not None
    assert 0 < row.error_rms <= row.error_limit < 0.02
    assert row.error_exact > row.error_rms
    assert row.bits_per_value > replace(SMALL, form=form).config.value.bits
    assert row.bytes_per_s > 0


@pytest.mark.usefixtures("decode_by_definition")
@pytest.mark.parametrize(("against", "ragged"), [("contiguous pages", False), ("even batch", True)])
def test_decode_against_itself(known: dict[str, Any], against: str, ragged: bool) -> None:
    (row,) = measure_case(replace(SMALL, ragged=ragged), known, CPU, against=against, repeats=3)
    check_speeds(row)
    assert row.baseline == against


@pytest.mark.parametrize("wrong", [math.nan, 1.0])
def test_a_wrong_result_has_no_speed(monkeypatch: pytest.MonkeyPatch, known: dict[str, Any], wrong: float) -> None:
    def broken(kv: object, implementation: str | None) -> Callable[[Tensor], Tensor]:
        return lambda q: torch.full_like(q, wrong)

    monkeypatch.setattr(adapters, "decode", broken)
    (row,) = measure_case(SMALL, known, CPU, repeats=1)
    assert "wrong result" in row.failure
    assert all(getattr(row, name) is None for name in SPEEDS)


def test_a_kernel_that_raises_gives_its_reason(monkeypatch: pytest.MonkeyPatch, known: dict[str, Any]) -> None:
    def broken(kv: object, implementation: str | None) -> Callable[[Tensor], Tensor]:
        raise RuntimeError("out of\nresources")

    monkeypatch.setattr(adapters, "decode", broken)
    (row,) = measure_case(SMALL, known, CPU, repeats=1)
    assert row.failure == "RuntimeError: out of resources"


@pytest.mark.usefixtures("decode_by_definition")
def test_peers_have_rows_of_their_own(known: dict[str, Any]) -> None:
    def missing(cache: Cache16) -> Callable[[Tensor], Tensor]:
        raise UnsupportedError("not installed")

    def works(cache: Cache16) -> Callable[[Tensor], Tensor]:
        key, value = cache.dense()
        return lambda q: torch.nn.functional.scaled_dot_product_attention(q, key, value, enable_gqa=True)

    peers = [DecodeBaseline("missing", missing, quantised=True), DecodeBaseline("peer", works, quantised=True)]
    own, first, second = measure_case(SMALL, known, CPU, decode_peers=peers, repeats=1)
    check_speeds(own)
    assert first.failure == "UnsupportedError: not installed"
    assert first.candidate_ms is None
    check_speeds(second)
    assert second.implementation == "peer"
    assert second.error_rms == own.error_rms or second.error_exact < 0.02


@pytest.mark.parametrize("form", ["turbo4", "turbo2", "kivi4"])
def test_append_row(known: dict[str, Any], form: str) -> None:
    (row,) = measure_case(replace(SMALL, op="append", form=form), known, CPU, repeats=1)
    check_speeds(row)
    assert row.error_rms == 0
    assert row.quantisation_ms > 0


@pytest.mark.usefixtures("decode_by_definition")
def test_append_as_a_share_of_decode(known: dict[str, Any]) -> None:
    (row,) = measure_case(replace(SMALL, op="append"), known, CPU, against="decode step", repeats=1)
    check_speeds(row)
    assert row.baseline == "decode step"


def test_append_counts_wrong_bytes(monkeypatch: pytest.MonkeyPatch, known: dict[str, Any]) -> None:
    prepare = adapters.append_steps

    def one_byte_off(*arguments: Any) -> adapters.AppendSteps:
        return replace(prepare(*arguments), wrong_bytes=0.01)

    monkeypatch.setattr(adapters, "append_steps", one_byte_off)
    (row,) = measure_case(replace(SMALL, op="append"), known, CPU, repeats=1)
    assert "1.00% of the bytes differ" in row.failure
    assert row.candidate_ms is None


@pytest.mark.parametrize("causal", [False, True])
def test_prefill_row(monkeypatch: pytest.MonkeyPatch, known: dict[str, Any], causal: bool) -> None:
    def by_definition(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, implementation: str | None
    ) -> Callable[[], Tensor]:
        def call() -> Tensor:
            x, key, value = (t[None] for t in adapters.int8_values(q[:1], k[:1], v[:1]))
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(x, key, value, is_causal=causal, enable_gqa=True).to(q.dtype)

        return call

    monkeypatch.setattr(adapters, "int8_prefill", by_definition)
    case = replace(SMALL, op="prefill", batch=1, causal=causal)
    own, peer = measure_case(case, known, CPU, prefill_peers=[PrefillBaseline("none", _missing)], repeats=1)
    check_speeds(own)
    assert own.error_rms < 0.01
    assert own.error_exact < 0.1
    assert own.quantisation_ms is None  # on a CPU it is no call of its own
    assert peer.failure == "UnsupportedError: no peer"


def _missing(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    raise UnsupportedError("no peer")


@pytest.mark.usefixtures("decode_by_definition")
def test_csv_keeps_every_column(known: dict[str, Any], tmp_path: Path) -> None:
    rows = measure_case(SMALL, known, CPU, repeats=1)
    append_csv(tmp_path / "rows.csv", rows)
    append_csv(tmp_path / "rows.csv", rows)
    found = read_csv([tmp_path / "rows.csv"])
    assert len(found) == 2
    assert tuple(found[0]) == COLUMNS
    assert float(found[0]["candidate_ms"]) == pytest.approx(rows[0].candidate_ms, rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"query_heads": 5},
        {"form": "nothing"},
        {"batch": 0},
        {"ragged": True, "batch": 1},
        {"ragged": True, "op": "prefill"},
    ],
)
def test_bad_cases_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        replace(SMALL, **change)


def test_ragged_lengths() -> None:
    case = replace(SMALL, ragged=True, batch=8, tokens=32768)
    assert (min(case.lengths), max(case.lengths)) == (100, 32768)
    assert abs(case.even().total_tokens - case.total_tokens) < case.batch


def test_the_papers_buffer_has_no_paged_cache(known: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="paper4"):
        measure_case(replace(SMALL, form="paper4"), known, CPU)
