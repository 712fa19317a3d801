"""The main job: ordinary attention against TurboAttention on one model and the same text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboattention.config import DEFAULT_PRESET
from turboattention.errors import invalid
from turboattention.evaluation import generation, speed
from turboattention.evaluation.environment import environment
from turboattention.evaluation.generation import continuation
from turboattention.evaluation.result import BaselineResult, CandidateResult, ComparisonResult, Series
from turboattention.evaluation.speed import Speed, measure_speed
from turboattention.evaluation.statistics import BLOCK, mean_interval, perplexity_interval
from turboattention.evaluation.stream import CandidateStream, Progress, policy_name, stream
from turboattention.evaluation.texts import BUNDLED_TEXTS, text_name, windows
from turboattention.integrations.models import LoadedModel, load_model
from turboattention.integrations.packaged_models import DEFAULT_MODEL

if TYPE_CHECKING:
    from turboattention.policy import Policy

LEAST_TOKENS = 2 * BLOCK
_HISTOGRAM_BINS = 30
_HISTOGRAM_RANGE = (-8.0, 2.0)  # log10 of nats; smaller and larger values count in the outermost bins


def compare(
    model: LoadedModel | str | Path = DEFAULT_MODEL,
    texts: Sequence[str | Path] = BUNDLED_TEXTS,
    policies: "str | Policy | Sequence[str | Policy]" = DEFAULT_PRESET,
    tokens: int = 2048,
    seed: int = 0,
    progress: Progress | None = None,
) -> ComparisonResult:
    """Measure every policy against ordinary attention: cache bytes, perplexity, divergence, speed, a continuation.

    model: a loaded model, or what ``load_model`` takes (then in float32 on the CPU).
    texts: names of bundled texts or paths; each gives one window of ``tokens`` tokens.
    policies: preset names or policies.
    seed: of the bootstrap; the measurement itself draws nothing.
    progress: called with steps done, steps in all and the name of the step.
    """
    if tokens < LEAST_TOKENS:
        raise invalid("tokens", f"at least {LEAST_TOKENS}, so that intervals have blocks to draw", tokens)
    chosen = list(policies) if isinstance(policies, Sequence) and not isinstance(policies, str) else [policies]
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    rows = windows(loaded.tokenizer, texts, tokens, loaded.context_length)
    steps = _Steps(progress, chunks=math.ceil(tokens / BLOCK) * (1 + len(chosen)), rest=2 + len(chosen))

    baseline, candidates = stream(loaded.model, rows, chosen, steps.chunk)
    everyone = [None, *chosen]
    timed = rows[:1, : min(speed.PROMPT_TOKENS, tokens)]
    speeds = measure_speed(loaded.model, timed, everyone)
    steps.tell("speed")
    prompt = rows[:1, : min(generation.PROMPT_TOKENS, tokens)]
    continued = []
    for policy in everyone:
        continued.append(continuation(loaded.model, loaded.tokenizer, prompt, policy))
        steps.tell("continuation")

    perplexity, perplexity_ci = perplexity_interval(baseline.nll, seed)
    machine = environment(loaded.model.dtype, loaded.model.device)
    machine["speed"] = f"batch 1, prompt of {speeds[0].context} tokens, {speed.DECODE_STEPS} decode steps after it"
    return ComparisonResult(
        environment=machine,
        model=loaded.name,
        text=[text_name(text) for text in texts],
        tokens=tokens,
        prompt=str(loaded.tokenizer.decode(prompt[0])),
        baseline=BaselineResult(
            perplexity=perplexity,
            perplexity_ci=perplexity_ci,
            kv_bytes=baseline.kv_bytes,
            prefill_tokens_per_s=speeds[0].prefill_tokens_per_s,
            decode_ms_per_token=speeds[0].decode_ms_per_token,
            continuation=continued[0],
        ),
        candidates=[
            _candidate(policy_name(policy), measured, baseline.nll, measured_speed, text, seed)
            for policy, measured, measured_speed, text in zip(
                chosen, candidates, speeds[1:], continued[1:], strict=True
            )
        ],
    )


class _Steps:
    """One count of steps over the parts of a comparison."""

    def __init__(self, progress: Progress | None, chunks: int, rest: int) -> None:
        self._progress, self._done, self._total = progress, 0, chunks + rest

    def chunk(self, done: int, total: int, label: str) -> None:
        self.tell(label)

    def tell(self, label: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, label)


def _candidate(
    name: str, measured: CandidateStream, baseline_nll: Tensor, timing: Speed, text: str, seed: int
) -> CandidateResult:
    perplexity, perplexity_ci = perplexity_interval(measured.nll, seed)
    delta, delta_ci = mean_interval(measured.nll - baseline_nll, seed)
    kl, kl_ci = mean_interval(measured.kl, seed)
    top1, top1_ci = mean_interval(measured.same_top, seed)
    bits = 8.0 * measured.kv_bytes / measured.num_values
    return CandidateResult(
        preset=name,
        perplexity=perplexity,
        perplexity_ci=perplexity_ci,
        delta_nll=delta,
        delta_nll_ci=delta_ci,
        kl_mean=kl,
        kl_ci=kl_ci,
        top1_agreement=top1,
        top1_ci=top1_ci,
        kv_bytes=measured.kv_bytes,
        bits_per_value=bits,
        compression=16.0 / bits,
        prefill_tokens_per_s=timing.prefill_tokens_per_s,
        decode_ms_per_token=timing.decode_ms_per_token,
        continuation=text,
        kl_by_position=kl_by_position(measured.kl),
        kl_histogram=kl_histogram(measured.kl),
    )


def kl_by_position(kl: Tensor, width: int = BLOCK) -> Series:
    """Mean of ``kl`` [rows, positions] over rows and bins of ``width`` positions."""
    parts = kl.double().split(width, dim=1)
    return Series([float(width * index) for index in range(len(parts))], [float(part.mean()) for part in parts])


def kl_histogram(kl: Tensor) -> Series:
    """Share of positions in each of 30 bins of log10(KL), the same bins for every run."""
    low, high = _HISTOGRAM_RANGE
    logs = kl.double().clamp_min(10.0**low).log10().clamp(low, high).flatten().cpu()
    counts, edges = torch.histogram(logs, bins=_HISTOGRAM_BINS, range=_HISTOGRAM_RANGE)
    return Series([float(edge) for edge in edges[:-1]], [float(count) / logs.numel() for count in counts])
