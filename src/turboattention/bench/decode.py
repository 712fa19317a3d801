"""Decode over a paged cache against the fastest 16-bit attention of the same process."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from turboattention.bench import adapters
from turboattention.bench.baselines import Attend, DecodeBaseline, decode_baselines
from turboattention.bench.case import Case
from turboattention.bench.data import (
    Cache16,
    Sequence16,
    bytes_read,
    check_form,
    copy_paged,
    expand_sequence,
    make_cache16,
    make_paged,
    synthetic,
)
from turboattention.bench.errors import decode_error
from turboattention.bench.reading import read_ms
from turboattention.bench.result import Row, failed, new_row
from turboattention.bench.timing import Timing, buffers_needed, measure
from turboattention.ops.common.paged_kv import PagedKV

Against = Literal["16-bit", "even batch", "contiguous pages"]
# A 16-bit attention with a larger error is broken (bfloat16 on a CPU has 3e-3) and is no baseline.
PLAUSIBLE_16BIT = 2e-2
# Codes of a peer lose more, and what they lose on synthetic data judges nothing: only nonsense is refused.
PLAUSIBLE_PEER = 0.8


@dataclass(frozen=True)
class Measured:
    """One implementation: its time and error, or why it has none."""

    name: str
    timing: Timing | None = None
    error: float | None = None
    reason: str = ""
    exact: bool = False


def measure_decode(
    case: Case, machine: dict[str, Any], device: torch.device, *, against: Against = "16-bit",
    peers: Sequence[DecodeBaseline] = (), repeats: int | None = None,
) -> list[Row]:  # fmt: skip
    """The row of ``case`` and one for each peer; ``against`` says what the baseline is.

    A candidate that fails or whose error exceeds the limit gives a row with its reason and without any speed. So does a
    peer. The errors of ``even batch`` and ``contiguous pages`` are judged like all others.
    """
    check_form(case)
    base = synthetic(case, device)
    row = new_row(case, machine, adapters.implementation_of(case, device))
    found = _baselines(case, base, device, repeats, [*decode_baselines(device), *peers])
    own = [m for m in found if m.name not in {peer.name for peer in peers}]
    passed = [m for m in own if m.timing is not None]
    if not passed:
        return [failed(row, "no 16-bit baseline ran: " + "; ".join(f"{m.name}: {m.reason}" for m in own))]
    best = min(passed, key=ms_of)
    limit = 2 * max(m.error or 0.0 for m in passed if not m.exact and (m is best or best.exact))
    row = replace(row, compared=listing(found), error_limit=limit)
    rows = [_candidate(row, case, base, device, repeats, against, best)]
    rows += [_peer_row(row, m, best) for m in found if m not in own]
    return rows


def _candidate(
    row: Row, case: Case, base: Sequence16, device: torch.device, repeats: int | None, against: Against, best: Measured
) -> Row:
    try:
        row, timing = _own(row, case, base, device, repeats)
        if timing is None:
            return row
        if against != "16-bit":
            other = case.even() if against == "even batch" else replace(case, order="contiguous")
            other_row, other_timing = _own(row, other, synthetic(other, device), device, repeats)
            if other_timing is None:
                return failed(row, f"{against}: {other_row.failure}")
            best = Measured(against, other_timing)
    except Exception as error:  # whatever a kernel raises is this row's reason, and other rows still run
        return failed(row, reason_of(error))
    finally:
        free(device)
    assert best.timing is not None
    return with_speed(row, best.name, best.timing, timing)


def _own(
    row: Row, case: Case, base: Sequence16, device: torch.device, repeats: int | None
) -> tuple[Row, Timing | None]:
    """The row with its error, and the time; a failed row and None when the result is wrong."""
    first = make_paged(case, base)
    attend = adapters.decode(first, case.implementation)
    error = decode_error(attend, base, case.lengths, lambda s, h: expand_sequence(first, s, h))
    exact = decode_error(attend, base, case.lengths, lambda s, h: base.tokens(h, case.lengths[s]))
    row = replace(row, error_rms=error, error_exact=exact)
    limit = row.error_limit or 0.0
    if not error <= limit:
        return failed(row, f"wrong result: error {error:.2e}, limit {limit:.2e}"), None
    nbytes = bytes_read(case, first)
    caches = [first, *(copy_paged(first) for _ in range(buffers_needed(nbytes, device) - 1))]
    calls = [_bound(adapters.decode(kv, case.implementation), base) for kv in caches]
    timing = measure(calls, device, repeats)
    reading = _reading(caches, nbytes)
    bits = 8 * nbytes / (2 * case.total_tokens * case.kv_heads * case.head_dim)
    share = None if reading is None else reading / timing.ms
    row = replace(row, bits_per_value=bits, bytes_per_s=1e3 * nbytes / timing.ms, share_of_bandwidth=share)
    return row, timing


def _reading(caches: list[PagedKV], nbytes: int) -> float | None:
    """Milliseconds to only read ``nbytes``, from the time for the pool of pages, which is nearly all of them."""
    pools = [group.pool for kv in caches for group in kv.groups[:1]]
    ms = read_ms(pools)
    return None if ms is None else ms * nbytes / pools[0].numel()


def _baselines(
    case: Case, base: Sequence16, device: torch.device, repeats: int | None, baselines: Sequence[DecodeBaseline]
) -> list[Measured]:
    first = make_cache16(case, base)
    nbytes = 2 * first.key.numel() * first.key.element_size()
    caches = [first, *(first.copy() for _ in range(buffers_needed(nbytes, device) - 1))]
    found = [_measured(baseline, case, base, caches, device, repeats) for baseline in baselines]
    del caches, first
    free(device)
    return found


def _measured(
    baseline: DecodeBaseline, case: Case, base: Sequence16, caches: list[Cache16], device: torch.device,
    repeats: int | None,
) -> Measured:  # fmt: skip
    try:
        attend = baseline.prepare(caches[0])
        error = decode_error(attend, base, case.lengths, lambda s, h: base.tokens(h, case.lengths[s]))
        plausible = PLAUSIBLE_PEER if baseline.quantised else PLAUSIBLE_16BIT
        if not error <= plausible:
            return Measured(baseline.name, error=error, reason=f"error {error:.2e}, more than {plausible}")
        calls = [_bound(attend if cache is caches[0] else baseline.prepare(cache), base) for cache in caches]
        for call in calls:
            call()  # plans and compiles, which a graph can't capture
        return Measured(baseline.name, measure(calls, device, repeats), error, exact=baseline.exact)
    except Exception as error:  # a baseline that can't run here is left out, with its reason
        return Measured(baseline.name, reason=reason_of(error))
    finally:
        free(device)


def _peer_row(row: Row, peer: Measured, best: Measured) -> Row:
    row = replace(row, preset=peer.name, implementation=peer.name, error_exact=peer.error, error_limit=None)
    if peer.timing is None:
        return failed(row, peer.reason)
    assert best.timing is not None
    return with_speed(row, best.name, best.timing, peer.timing)


def with_speed(row: Row, name: str, base: Timing, timing: Timing) -> Row:
    """``row`` with the times of its baseline and its own."""
    return replace(
        row, baseline=name, baseline_ms=base.ms, baseline_p10_ms=base.p10_ms, baseline_p90_ms=base.p90_ms,
        candidate_ms=timing.ms, candidate_p10_ms=timing.p10_ms, candidate_p90_ms=timing.p90_ms,
        ratio=base.ms / timing.ms, sm_clock_mhz=timing.sm_clock_mhz,
    )  # fmt: skip


def ms_of(measured: Measured) -> float:
    """Its median time; it has one."""
    assert measured.timing is not None
    return measured.timing.ms


def listing(found: Sequence[Measured]) -> str:
    """All that was compared, fastest first, then what did not run and why."""
    ran = sorted((m for m in found if m.timing is not None), key=ms_of)
    parts = [f"{m.name} {ms_of(m):.4g} ms" for m in ran]
    return "; ".join(parts + [f"{m.name}: {m.reason[:120]}" for m in found if m.timing is None])


def _bound(attend: Attend, base: Sequence16) -> Callable[[], object]:
    return lambda: attend(base.peaked)


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def free(device: torch.device) -> None:
    """Give memory back: the next buffers are as large."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
