"""Prefill of a fresh chunk in INT8, quantisation included, against the fastest 16-bit attention of the same process."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from turboattention.bench import adapters
from turboattention.bench.baselines import PrefillBaseline, prefill_baselines
from turboattention.bench.case import Case
from turboattention.bench.data import dtype_of, generator_on, realistic
from turboattention.bench.decode import (
    PLAUSIBLE_16BIT,
    PLAUSIBLE_PEER,
    Measured,
    free,
    listing,
    ms_of,
    reason_of,
    with_speed,
)
from turboattention.bench.errors import checked_heads, largest, relative_rms64
from turboattention.bench.result import Row, failed, new_row
from turboattention.bench.timing import buffers_needed, measure

INT8_LIMIT = 0.015  # what 8-bit probabilities may add to the error of the INT8 operands
CHECKED_ROWS = 256
Inputs = tuple[Tensor, Tensor, Tensor]


def measure_prefill(
    case: Case, machine: dict[str, Any], device: torch.device, *, peers: Sequence[PrefillBaseline] = (),
    repeats: int | None = None,
) -> list[Row]:  # fmt: skip
    """The row of ``case`` and one for each peer."""
    peaked, flat = (inputs(case, device, sharp) for sharp in (1.0, 0.0))
    row = new_row(case, machine, adapters.prefill_implementation(peaked[0], case.implementation))
    nbytes = sum(x.numel() * x.element_size() for x in peaked)
    copies = min(8, buffers_needed(nbytes, device))  # a chunk computes far longer than it reads
    buffers = [peaked]
    buffers += [(q.clone(), k.clone(), v.clone()) for q, k, v in [peaked] * (copies - 1)]
    own = [_measured(b, case, buffers, flat, device, repeats) for b in prefill_baselines(device)]
    others = [_measured(b, case, buffers, flat, device, repeats) for b in peers]
    passed = [m for m in own if m.timing is not None]
    if not passed:
        return [failed(row, "no 16-bit baseline ran: " + "; ".join(f"{m.name}: {m.reason}" for m in own))]
    best = min(passed, key=ms_of)
    assert best.timing is not None
    row = replace(row, compared=listing([*own, *others]), error_limit=INT8_LIMIT)
    rows = []
    try:
        errors, exact = [], []
        for q, k, v in (peaked, flat):
            out = adapters.int8_prefill(q, k, v, case.causal, case.implementation)()
            errors.append(sampled_error(out, q, k, v, case.causal, adapters.int8_values))
            exact.append(sampled_error(out, q, k, v, case.causal))
        error = largest(errors)
        row = replace(row, error_rms=error, error_exact=largest(exact))
        if error <= INT8_LIMIT:
            calls = [adapters.int8_prefill(*x, case.causal, case.implementation) for x in buffers]
            timing = measure(calls, device, repeats)
            prepass = [call for x in buffers if (call := adapters.int8_prepass(*x))]
            quantising = measure(prepass, device, repeats).ms if prepass else None
            rows.append(replace(with_speed(row, best.name, best.timing, timing), quantisation_ms=quantising))
        else:
            rows.append(failed(row, f"wrong result: error {error:.2e}, limit {INT8_LIMIT:.2e}"))
    except Exception as error:  # whatever a kernel raises is this row's reason, and other rows still run
        rows.append(failed(row, reason_of(error)))
    for peer in others:
        peer_row = replace(
            row, preset=peer.name, implementation=peer.name, error_rms=None, error_limit=None, error_exact=peer.error
        )
        if peer.timing is None:
            rows.append(failed(peer_row, peer.reason))
        else:
            rows.append(with_speed(peer_row, best.name, best.timing, peer.timing))
    return rows


def inputs(case: Case, device: torch.device, sharp: float) -> Inputs:
    """q, k, v ``[batch, heads, tokens, head_dim]``; a row of q is noise and ``sharp`` times the key of its place."""
    random = generator_on(device)
    k, v = (x[None] for x in realistic(case.kv_heads, case.tokens, case.head_dim, random))
    ratio = case.query_heads // case.kv_heads
    noise = torch.randn(1, case.query_heads, case.tokens, case.head_dim, device=device, generator=random)
    centred = (k - k.mean(2, keepdim=True)).repeat_interleave(ratio, 1)
    q = (1.0 if sharp else 0.5) * noise + sharp * centred
    dtype = dtype_of(device)
    q, k, v = (x.to(dtype).expand(case.batch, -1, -1, -1).contiguous() for x in (q, k, v))
    return q, k, v


def sampled_error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool,
    values: Callable[[Tensor, Tensor, Tensor], Inputs] | None = None,
) -> float:  # fmt: skip
    """Relative RMS against float64 of some rows (the last ones among them) of two KV heads of the first sequence.

    values: from 16-bit q, k, v to the float64 values that count; None: themselves. All of ``out`` must be finite.
    """
    if not bool(out.isfinite().all()):
        return float("nan")
    kv_heads, tokens = k.shape[1:3]
    ratio = q.shape[1] // kv_heads
    heads = list(checked_heads(kv_heads))
    rows = torch.linspace(0, tokens - 1, min(CHECKED_ROWS, tokens), device=q.device).round().long().unique()
    query_heads = [h * ratio + r for h in heads for r in range(ratio)]
    chosen = (q[:1, query_heads], k[:1, heads], v[:1, heads])
    x, key, value = values(*chosen) if values else (t[0].double() for t in chosen)
    mask = torch.arange(tokens, device=q.device) > rows[:, None] if causal else None
    expected = []
    for i in range(len(query_heads)):
        scores = x[i, rows] @ key[i // ratio].T * q.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(mask, -torch.inf)
        expected.append(torch.softmax(scores, -1) @ value[i // ratio])
    return relative_rms64(out[0, query_heads][:, rows], torch.stack(expected))


def _measured(
    baseline: PrefillBaseline, case: Case, buffers: list[Inputs], flat: Inputs, device: torch.device,
    repeats: int | None,
) -> Measured:  # fmt: skip
    try:
        errors = [sampled_error(baseline.prepare(*x, case.causal)(), *x, case.causal) for x in (buffers[0], flat)]
        error = largest(errors)
        plausible = PLAUSIBLE_PEER if baseline.quantised else PLAUSIBLE_16BIT
        if not error <= plausible:
            return Measured(baseline.name, error=error, reason=f"error {error:.2e}, more than {plausible}")
        calls = [baseline.prepare(*x, case.causal) for x in buffers]
        return Measured(baseline.name, measure(calls, device, repeats), error)
    except Exception as error:  # a baseline that can't run here is left out, with its reason
        return Measured(baseline.name, reason=reason_of(error))
    finally:
        free(device)
