"""Append: steps of one token, the compression of a page that becomes full included."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from turboattention.bench import adapters
from turboattention.bench.case import Case
from turboattention.bench.data import check_form, dtype_of, generator_on, realistic
from turboattention.bench.decode import measure_decode, reason_of, with_speed
from turboattention.bench.result import Row, failed, new_row
from turboattention.bench.timing import Timing, measure
from turboattention.errors import UnsupportedError

AgainstAppend = Literal["16-bit", "decode step"]
COPY = "copy of 16-bit K and V"


def measure_append(
    case: Case, machine: dict[str, Any], device: torch.device, *, against: AgainstAppend = "16-bit",
    repeats: int | None = None,
) -> list[Row]:  # fmt: skip
    """The row of ``case``: candidate_ms is the mean of the steps that fill a page.

    quantisation_ms: of the one step that compresses a page of every sequence at once. error_rms: share of the bytes of
    that page that differ from the definition, which may be none. against: the same tokens copied into a 16-bit cache,
    or ``decode step``: one decode of the same case, so that 1 / ratio is the share of append.
    """
    row = new_row(case, machine, adapters.implementation_of(case, device))
    row = replace(row, error_limit=0.0)
    try:
        check_form(case)
        if case.ragged:
            raise UnsupportedError("append is measured on sequences of one length")
        dtype = dtype_of(device)
        random = generator_on(device)
        shape = (case.batch, case.kv_heads, case.config.page_size, case.head_dim)
        key, value = (
            x.view(shape).to(dtype) for x in realistic(shape[0] * shape[1], shape[2], shape[3], random)
        )  # fmt: skip
        steps = adapters.append_steps(case, device, dtype, key, value)
        row = replace(row, error_rms=steps.wrong_bytes, bits_per_value=steps.bits_per_value)
        if steps.wrong_bytes:
            return [failed(row, f"wrong result: {steps.wrong_bytes:.2%} of the bytes differ from the definition")]
        count = len(steps.calls)
        timing = _for_each(measure([_all(steps.calls)], device, repeats), count)
        compressing = measure([steps.calls[steps.compressing]], device, repeats)
        row = replace(row, quantisation_ms=compressing.ms)
        if against == "decode step":
            decode = measure_decode(replace(case, op="decode"), machine, device, repeats=repeats)[0]
            if decode.failure:
                return [failed(row, f"decode: {decode.failure}")]
            times = (decode.candidate_ms, decode.candidate_p10_ms, decode.candidate_p90_ms)
            ms, p10, p90 = (x or 0.0 for x in times)
            base = Timing(ms, p10, p90)
            return [with_speed(row, "decode step", base, timing)]
        base = _for_each(measure([_all(_copies(case, key, value))], device, repeats), count)
        return [with_speed(row, COPY, base, timing)]
    except Exception as error:  # whatever a kernel raises is this row's reason, and other rows still run
        return [failed(row, reason_of(error))]


def _all(calls: list[Callable[[], None]]) -> Callable[[], None]:
    def call() -> None:
        for step in calls:
            step()

    return call


def _for_each(timing: Timing, count: int) -> Timing:
    return Timing(timing.ms / count, timing.p10_ms / count, timing.p90_ms / count, timing.sm_clock_mhz)


def _copies(case: Case, key: Tensor, value: Tensor) -> list[Callable[[], None]]:
    size = case.config.page_size
    cache = [torch.empty_like(key) for _ in range(2)]

    def copy(step: int) -> None:
        for stored, new in zip(cache, (key, value), strict=True):
            stored[:, :, step].copy_(new[:, :, step])

    return [lambda step=step: copy(step) for step in range(size)]  # type: ignore[misc] # mypy has no default of lambda
