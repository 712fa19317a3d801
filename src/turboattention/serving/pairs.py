"""Both answers to each request: agreement, flips, ratios."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from turboattention.serving.agreement import Agreement, agreement
from turboattention.serving.answer import Answer
from turboattention.serving.measure import bootstrapped, flip_difference, share
from turboattention.serving.prompts import Request
from turboattention.serving.result import Curves, Flip, PairResult
from turboattention.serving.scores import Score, right
from turboattention.serving.sides import tpot_ms, ttft_ms
from turboattention.serving.statistics import mcnemar, mean, ratio_of_means, ratio_of_medians

FLIPS = 20  # samples shown of each kind
# Pairs, and share of all, with the same characters as other tokens: one tokenizer alone does that rarely.
_MIXED, _MIXED_SHARE = 3, 0.1
_CURVE_STEP = 10  # characters


@dataclass(frozen=True)
class Pair:
    """agreement: None when a side failed."""

    request: Request
    before: Answer
    after: Answer
    agreement: Agreement | None

    @staticmethod
    def of(request: Request, before: Answer, after: Answer) -> "Pair":
        whole = before.error is None and after.error is None
        return Pair(request, before, after, agreement(before, after) if whole else None)


def mixed_tokens(pairs: Sequence[Pair]) -> str:
    """Why tokens of the sides do not mean the same; "" when nothing says so."""
    whole = [pair for pair in pairs if pair.agreement is not None]
    counts = [(pair.before.prompt_tokens, pair.after.prompt_tokens) for pair in whole]
    other = sum(before != after for before, after in counts if before is not None and after is not None)
    if other:
        return f"{other} of {len(whole)} prompts have other token counts"
    split = sum(pair.agreement.split_differently for pair in whole if pair.agreement)
    if split >= _MIXED and split > _MIXED_SHARE * len(whole):
        return f"{split} of {len(whole)} answers hold the same characters as other tokens"
    return ""


def pair_result(pairs: Sequence[Pair], confidence: float, kind: Score, comparable: bool) -> PairResult:
    """``comparable``: tokens of both sides mean the same."""
    whole = [pair for pair in pairs if pair.agreement is not None]
    found = [pair.agreement for pair in whole if pair.agreement is not None]
    answers = [(pair.before, pair.after) for pair in whole]
    in_tokens = comparable and all(one.prefix_tokens is not None for one in found)
    first = [(one.prefix_tokens if in_tokens else one.prefix) or 0 for one in found if not one.same]
    logprobs = [one.logprob_differences for one in found if one.logprob_differences and comparable]
    counts = [len(values) for values in logprobs]
    scores = [
        (right(kind, p.before, p.request), right(kind, p.after, p.request)) for p in pairs if p.request.references
    ]
    lost, gained = scores.count((True, False)), scores.count((False, True))
    lengths = [
        (b.completion_tokens, a.completion_tokens) if comparable else (len(b.text), len(a.text)) for b, a in answers
    ]
    ttft = [(b.ttft_s, a.ttft_s) for b, a in answers if b.ttft_s and a.ttft_s]
    tpot = [(b.tpot_s, a.tpot_s) for b, a in answers if b.tpot_s and a.tpot_s and comparable]
    return PairResult(
        pairs=len(whole),
        same=share(sum(one.same for one in found), len(found), confidence),
        prefix_share=bootstrapped(mean, [[one.share for one in found]], confidence),
        first_difference=float(median(first)) if first else None,
        first_difference_unit="tokens" if in_tokens else "characters",
        logprob_difference=bootstrapped(ratio_of_means, [[math.fsum(v) for v in logprobs], counts], confidence),
        logprob_distance=bootstrapped(ratio_of_means, [[math.fsum(map(abs, v)) for v in logprobs], counts], confidence),
        logprob_tokens=sum(counts),
        scored=len(scores),
        score_difference=flip_difference(lost, gained, len(scores), confidence),
        score_bootstrap=bootstrapped(mean, [[after - before for before, after in scores]], confidence),
        mcnemar_p=mcnemar(lost, gained) if scores else None,
        lost=lost,
        gained=gained,
        length_ratio=bootstrapped(ratio_of_means, _columns(lengths), confidence),
        length_unit="tokens" if comparable else "characters",
        ttft_ratio=bootstrapped(ratio_of_medians, _columns(ttft), confidence),
        tpot_ratio=bootstrapped(ratio_of_medians, _columns(tpot), confidence),
    )


def _columns(pairs: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Candidates, then baselines: numerator and denominator."""
    return [[after for _, after in pairs], [before for before, _ in pairs]]


def flips(pairs: Sequence[Pair], kind: Score) -> list[Flip]:
    """Lost first, then gained, then the texts that part earliest; at most `FLIPS` of each."""
    found: dict[str, list[Flip]] = {"lost": [], "gained": [], "differs": []}
    for pair in pairs:
        was, now = right(kind, pair.before, pair.request), right(kind, pair.after, pair.request)
        flip: Literal["lost", "gained", "differs"] = "differs"
        if was != now:
            flip = "lost" if was else "gained"
        elif pair.agreement is None or pair.agreement.same:
            continue
        found[flip].append(
            Flip(
                id=pair.request.id,
                kind=flip,
                prompt=pair.request.text(),
                references=list(pair.request.references),
                baseline=_shown(pair.before),
                candidate=_shown(pair.after),
                prefix=pair.agreement.prefix if pair.agreement else 0,
            )
        )
    found["differs"].sort(key=lambda flip: flip.prefix)
    return [flip for group in found.values() for flip in group[:FLIPS]]


def _shown(answer: Answer) -> str:
    return answer.text if answer.error is None else f"[{answer.error.kind}: {answer.error.message}] {answer.text}"


def curves(pairs: Sequence[Pair]) -> Curves:
    """Of the pairs that both sides answered."""
    whole = [pair for pair in pairs if pair.agreement is not None]
    sides = {"baseline": [pair.before for pair in whole], "candidate": [pair.after for pair in whole]}
    longest = max((len(answer.text) for answers in sides.values() for answer in answers), default=0)
    ends = [math.inf if one.same else one.prefix for pair in whole if (one := pair.agreement)]
    steps = list(range(0, longest + _CURVE_STEP, _CURVE_STEP)) if ends else []
    return Curves(
        ttft_ms={side: sorted(ttft_ms(answers)) for side, answers in sides.items()},
        tpot_ms={side: sorted(tpot_ms(answers)) for side, answers in sides.items()},
        characters=steps,
        agreeing=[sum(end >= step for end in ends) / len(ends) for step in steps],
    )
