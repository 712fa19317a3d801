"""A model and a card to a plan: what fits, how fast, at what cost, and where compression gains nothing."""

from dataclasses import dataclass
from functools import partial

from turboattention.errors import InvalidInputError, invalid
from turboattention.planning.calibration import Calibration, load_calibration
from turboattention.planning.gains import CANDIDATE, explain, gains
from turboattention.planning.gpu import Gpu
from turboattention.planning.kv_bytes import BF16, Form, all_forms, bits_per_value, sequence_bytes, token_bytes
from turboattention.planning.model import ModelFacts
from turboattention.planning.result import FormPlan, PlanResult, Speed
from turboattention.planning.roofline import decode_step, prompt_seconds, without_time

_GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """What is asked of the card, or of several that share every layer.

    prompt, output: tokens of each request. batch: requests at once, at which all forms are compared; None: as many as
    fit in 16 bits. max_batch: the engine takes no more at once. weight_bits: of a stored weight. memory_share: of the
    card's memory, as vLLM's --gpu-memory-utilization. tensor_parallel_size: cards, as vLLM's.
    """

    prompt: int = 8192
    output: int = 512
    batch: int | None = None
    max_batch: int = 256
    weight_bits: float = 16
    memory_share: float = 0.9
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt", "output", "batch", "max_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise invalid(name, "at least 1", value)
        if self.batch is not None and self.batch > self.max_batch:
            raise invalid("batch", f"at most max_batch ({self.max_batch})", self.batch)
        if not 0 < self.memory_share <= 1:
            raise invalid("memory_share", "above 0, at most 1", self.memory_share)
        if not 1 <= self.weight_bits <= 32:
            raise invalid("weight_bits", "1 to 32", self.weight_bits)

    @property
    def context(self) -> int:
        return self.prompt + self.output


def plan(
    model: ModelFacts, gpu: Gpu, workload: Workload | None = None, calibration: Calibration | None = None
) -> PlanResult:
    """Everything about serving ``model`` on one ``gpu`` or several.

    Raises InvalidInputError where the context is longer than the model was made for, the weights leave no room, or
    cards can't share the heads.
    """
    work, measured = workload or Workload(), calibration or load_calibration()
    if work.context > model.context:
        raise invalid(
            "prompt and output", f"at most {model.context:,} tokens, the context of {model.name}", work.context
        )
    cards, whole = work.tensor_parallel_size, model
    model = whole.split(cards)
    weights = model.parameters * work.weight_bits / 8
    reserve = measured.reserved(model.ranks)
    free = gpu.memory_bytes * work.memory_share - weights - reserve
    if free <= 0:
        raise InvalidInputError(
            f"memory of {gpu.name}: expected room for weights of {weights / _GIB:.1f} GiB and "
            f"{reserve / _GIB:.1f} GiB of the engine, received "
            f"{gpu.memory_bytes * work.memory_share / _GIB:.1f} GiB; use --weight-bits 8 or 4, a larger card, or more "
            "of them with --tensor-parallel-size"
        )
    fits = partial(largest_batch, model=model, free=free, tokens=work.context)
    batch = work.batch or max(1, min(fits(BF16), work.max_batch))
    # transformers runs our caches on one card alone.
    chosen = (form for form in all_forms() if form.serves or cards == 1)
    forms = tuple(_form_plan(form, model, gpu, measured, work, free, batch) for form in chosen)
    grid = gains(model, gpu, measured, free, work.weight_bits, work.max_batch)
    return PlanResult(
        model=whole.name, parameters=whole.parameters, layers=model.layers, compressed_layers=model.full_layers,
        kv_heads=whole.kv_heads, head_dim=model.head_dim, gpu=gpu.title, cards=cards, prompt=work.prompt,
        output=work.output, batch=batch, max_batch=work.max_batch, weight_bytes=cards * weights,
        free_bytes=cards * free, forms=forms,
        candidate=CANDIDATE, gains=grid,
        notes=(
            *explain(model, gpu, measured, free, work.weight_bits, work.max_batch),
            *_notes(model, whole, gpu, measured),
        ),
        sources=measured.sources,
    )  # fmt: skip


def largest_batch(form: Form, model: ModelFacts, free: float, tokens: int) -> int:
    """Sequences of ``tokens`` tokens that fit into ``free`` bytes."""
    return int(free // sequence_bytes(form, model, tokens))


def largest_context(form: Form, model: ModelFacts, free: float, batch: int) -> int:
    """Tokens that each of ``batch`` sequences may have, no more than the model was made for; 0 where none fits."""
    low, high = 0, model.context
    while low < high:
        middle = (low + high + 1) // 2
        if batch * sequence_bytes(form, model, middle) <= free:
            low = middle
        else:
            high = middle - 1
    return low


def _form_plan(
    form: Form, model: ModelFacts, gpu: Gpu, measured: Calibration, work: Workload, free: float, batch: int
) -> FormPlan:
    fits = largest_batch(form, model, free, work.context)
    reason = without_time(form, model, gpu, measured) or ("" if fits else "not one sequence fits")
    own = 0 if reason else min(fits, work.max_batch)
    return FormPlan(
        name=form.name, runs_in="vLLM" if form.serves else "transformers",
        bits_per_value=bits_per_value(form, model, work.context), token_bytes=model.ranks * token_bytes(form, model),
        sequence_bytes=model.ranks * sequence_bytes(form, model, work.context), largest_batch=fits,
        largest_context=largest_context(form, model, free, batch),
        same=_speed(form, model, gpu, measured, work, batch) if own >= batch else None,
        own=_speed(form, model, gpu, measured, work, own) if own else None,
        why_no_speed=reason,
    )  # fmt: skip


def _speed(form: Form, model: ModelFacts, gpu: Gpu, measured: Calibration, work: Workload, batch: int) -> Speed:
    middle = work.prompt + work.output // 2
    step = decode_step(form, model, gpu, measured, batch, middle, work.weight_bits)
    prompt = prompt_seconds(model, gpu, measured, work.prompt)
    seconds = step.ms * 1e-3 / batch + prompt / work.output  # of the cards, for a token of an answer
    dollars = None if gpu.price_per_hour is None else model.ranks * gpu.price_per_hour / 3600 * seconds * 1e6
    return Speed(
        batch=batch, ms_per_token=step.ms, bound=step.bound, first_token_ms=prompt * 1e3 + step.ms,
        tokens_per_s=1 / seconds, dollars_per_million=dollars,
        kwh_per_million=model.ranks * gpu.power_w / 1000 / 3600 * seconds * 1e6,
    )  # fmt: skip


def _notes(model: ModelFacts, whole: ModelFacts, gpu: Gpu, measured: Calibration) -> list[str]:
    notes = []
    if model.full_layers < model.layers:
        notes.append(
            f"{model.layers - model.full_layers} of {model.layers} layers have a sliding window: they stay at 16 bits "
            "and hold no more than their window."
        )
    if model.ranks > 1:
        repeated = model.kv_heads * model.ranks // whole.kv_heads
        heads = f"; each KV head is held {repeated} times" if repeated > 1 else ""
        notes.append(
            f"{model.ranks} cards share every layer{heads}. What they send each other was measured on two H200 with "
            "NVLink alone."
        )
    if gpu.capability == 0:
        notes.append("On a CPU only sizes are planned: no engine was measured there.")
    elif gpu.name != measured.gpu:
        notes.append(f"Times take this card's data sheet with shares and latencies measured on {measured.gpu}.")
    if gpu.capability:
        notes.append(
            "Energy is that of a card at its power limit: an upper bound. Prices are rents of a card; edit them."
        )
    notes.append("Quality is not planned: turboattention compare measures it.")
    return notes
