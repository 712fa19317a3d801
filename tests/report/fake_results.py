"""A hand-made ComparisonResult: the report needs no model."""

import math

from turboattention.evaluation.result import BaselineResult, CandidateResult, ComparisonResult, Interval, Series

BASELINE_TEXT = "It was a bright cold day in April,\nand the clocks were striking thirteen."


def candidate(preset: str, kl: float, bits: float, continuation: str = BASELINE_TEXT) -> CandidateResult:
    edges = [-8 + step / 3 for step in range(30)]
    return CandidateResult(
        preset=preset,
        perplexity=21.37 * math.exp(kl / 2),
        perplexity_ci=Interval(18.91, 24.16),
        delta_nll=kl / 2,
        delta_nll_ci=Interval(kl / 4, kl),
        kl_mean=kl,
        kl_ci=Interval(0.9 * kl, 1.1 * kl),
        top1_agreement=1 - kl,
        top1_ci=Interval(1 - 1.2 * kl, 1 - 0.8 * kl),
        kv_bytes=int(141557760 * bits / 16),
        bits_per_value=bits,
        compression=16 / bits,
        prefill_tokens_per_s=512.4,
        decode_ms_per_token=71.25,
        continuation=continuation,
        kl_by_position=Series([64.0 * n for n in range(32)], [kl * (1 + 0.3 * math.sin(n)) for n in range(32)]),
        kl_histogram=Series(edges, [0.25 * math.exp(-(((x - math.log10(kl)) / 0.6) ** 2)) for x in edges]),
    )


def comparison(*candidates: CandidateResult, model: str = "smollm2-135m", prompt: str = "Once") -> ComparisonResult:
    return ComparisonResult(
        environment={"python": "3.11.4", "packages": {"torch": "2.13.0"}, "cpu_cores": 2},
        model=model,
        text=["moby-dick", "persuasion"],
        tokens=2048,
        prompt=prompt,
        baseline=BaselineResult(
            perplexity=21.37,
            perplexity_ci=Interval(18.86, 24.1),
            kv_bytes=141557760,
            prefill_tokens_per_s=734.6,
            decode_ms_per_token=38.96,
            continuation=BASELINE_TEXT,
        ),
        candidates=list(candidates) or [candidate("turbo4", 0.0091, 4.41)],
    )
