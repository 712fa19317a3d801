"""Where compressed pages make a step faster than 16 bits and FP8, and where they do not."""

from collections.abc import Iterator

from turboattention.planning.calibration import Calibration
from turboattention.planning.gpu import Gpu
from turboattention.planning.kv_bytes import BF16, FP8, Form, all_forms, sequence_bytes
from turboattention.planning.model import ModelFacts
from turboattention.planning.result import Gain
from turboattention.planning.roofline import decode_step, without_time

CANDIDATE = "turbo_int4"
CONTEXTS = (512, 2048, 8192, 32768, 131072)
BATCHES = (1, 8, 32, 128)
WORTHWHILE = 1.05  # a smaller gain is called none
_SHORTEST = 64


def gains(
    model: ModelFacts, gpu: Gpu, measured: Calibration, free: float, weight_bits: float, max_batch: int
) -> tuple[Gain, ...]:
    """A grid of batches and contexts; empty where the candidate has no time on this card."""
    ours = _candidate()
    if without_time(ours, model, gpu, measured):
        return ()
    return tuple(
        _gain(model, gpu, measured, free, weight_bits, batch, context)
        for batch in BATCHES
        if batch <= max_batch
        for context in _contexts(model)
    )


def _candidate() -> Form:
    return next(form for form in all_forms() if form.name == CANDIDATE)


def _contexts(model: ModelFacts) -> Iterator[int]:
    return (context for context in CONTEXTS if context <= model.context)


def _gain(
    model: ModelFacts, gpu: Gpu, measured: Calibration, free: float, weight_bits: float, batch: int, context: int
) -> Gain:
    def ms(form: Form) -> float | None:
        if batch * sequence_bytes(form, model, context) > free or without_time(form, model, gpu, measured):
            return None
        return decode_step(form, model, gpu, measured, batch, context, weight_bits).ms

    ours, plain, fp8 = ms(_candidate()), ms(BF16), ms(FP8)
    return Gain(
        batch, context, plain / ours if ours and plain else None, fp8 / ours if ours and fp8 else None, ours is not None
    )


def explain(
    model: ModelFacts, gpu: Gpu, measured: Calibration, free: float, weight_bits: float, max_batch: int
) -> list[str]:
    """One sentence for each batch: from which context on there is a gain."""
    ours = _candidate()
    if reason := without_time(ours, model, gpu, measured):
        return [f"{CANDIDATE} on this card: {reason}; sizes alone are planned."]
    sentences = []
    for batch in (b for b in BATCHES if b <= max_batch):
        found = {"bf16": _first(model, gpu, measured, batch, weight_bits, BF16)}
        if not without_time(FP8, model, gpu, measured):
            found["fp8"] = _first(model, gpu, measured, batch, weight_bits, FP8)
        words = [
            f"against {name} "
            + (f"from {context:,} tokens on" if context else f"nowhere up to {model.context:,} tokens")
            for name, context in found.items()
        ]
        sentences.append(f"Batch {batch}: {CANDIDATE} makes a step at least 5 % faster " + ", ".join(words) + ".")
    return [*sentences, "Below that nothing is gained but room for longer or more sequences."]


def _first(
    model: ModelFacts, gpu: Gpu, measured: Calibration, batch: int, weight_bits: float, other: Form
) -> int | None:
    """The first of 64, 128, 256, ... tokens from where the candidate is faster, whether or not that fits."""
    ours, context = _candidate(), _SHORTEST
    while context <= model.context:
        times = [decode_step(form, model, gpu, measured, batch, context, weight_bits).ms for form in (other, ours)]
        if times[0] >= WORTHWHILE * times[1]:
            return context
        context *= 2
    return None
