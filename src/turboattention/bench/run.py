"""One case to its rows, whatever the operator."""

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch

from turboattention.bench.append import AgainstAppend, measure_append
from turboattention.bench.baselines import DecodeBaseline, PrefillBaseline
from turboattention.bench.case import Case
from turboattention.bench.decode import Against, measure_decode
from turboattention.bench.prefill import measure_prefill
from turboattention.bench.result import Row
from turboattention.errors import invalid


def measure_case(
    case: Case, machine: dict[str, Any], device: torch.device, *, against: str = "16-bit",
    decode_peers: Sequence[DecodeBaseline] = (), prefill_peers: Sequence[PrefillBaseline] = (),
    repeats: int | None = None,
) -> list[Row]:  # fmt: skip
    """Rows of ``case``; machine: from `machine.machine`. Run it under ``torch.inference_mode()``.

    against: ``16-bit`` (the fastest), for decode also ``even batch`` and ``contiguous pages``, for append also
    ``decode step``.
    """
    if case.op == "prefill" and against == "16-bit":
        return measure_prefill(case, machine, device, peers=prefill_peers, repeats=repeats)
    if case.op == "append" and against in get_args(AgainstAppend):
        return measure_append(case, machine, device, against=cast(AgainstAppend, against), repeats=repeats)
    if case.op == "decode" and against in get_args(Against):
        return measure_decode(
            case, machine, device, against=cast(Against, against), peers=decode_peers, repeats=repeats
        )
    raise invalid("against", f"a baseline of {case.op}", repr(against))
