"""Judgements to numbers with intervals."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import permutations

import numpy as np
from scipy import stats

from turboattention.serving.result import Measured
from turboattention.serving.review.pairs import PairFile
from turboattention.serving.review.result import Counts, ReviewResult
from turboattention.serving.review.store import Judgement
from turboattention.serving.statistics import RESAMPLES, bootstrap, mcnemar, mean

CONFIDENCE = 0.95


def label(judgement: Judgement) -> str:
    """What a choice says about the sides: candidate, baseline, tie or both_bad."""
    if judgement.choice not in ("left", "right"):
        return judgement.choice
    return "candidate" if (judgement.choice == "left") == judgement.candidate_left else "baseline"


def analyse(file: PairFile, judgements: Sequence[Judgement], source: str, seed: int) -> ReviewResult:
    """Everything about a review so far; ``source`` names its pairs."""
    by_pair: dict[str, list[str]] = defaultdict(list)
    by_rater: dict[str, list[str]] = defaultdict(list)
    for judgement in judgements:
        by_pair[judgement.pair].append(label(judgement))
        by_rater[judgement.rater].append(label(judgement))
    net = [(x.count("candidate") - x.count("baseline")) / len(x) for x in by_pair.values()]
    won, lost = sum(x > 0 for x in net), sum(x < 0 for x in net)
    sides = [judgement.choice for judgement in judgements if judgement.choice in ("left", "right")]
    counts = _counts([label(judgement) for judgement in judgements])
    found = bootstrap(mean, net, confidence=CONFIDENCE) if net else None
    return ReviewResult(
        pairs=len(file.pairs),
        judged=len(by_pair),
        counts=counts,
        raters={rater: _counts(labels) for rater, labels in sorted(by_rater.items())},
        preferred=wilson(won, won + lost),
        net=None if found is None or len(net) < 2 else Measured(found[0], found[1].low, found[1].high, len(net)),
        not_worse=wilson(len(net) - lost, len(net)),
        both_bad=counts.both_bad / counts.total if counts.total else 0.0,
        sign_p=mcnemar(lost, won) if net else None,
        agreement=_agreement(list(by_pair.values())),
        left=wilson(sides.count("left"), len(sides)),
        bad_lines=file.bad_lines,
        source=source,
        fingerprint=file.fingerprint,
        seed=seed,
    )


def _counts(labels: Sequence[str]) -> Counts:
    found = Counter(labels)
    return Counts(found["candidate"], found["baseline"], found["tie"], found["both_bad"])


def wilson(hits: int, of: int) -> Measured | None:
    """A share with Wilson's interval; None of nothing."""
    if not of:
        return None
    found = stats.binomtest(hits, of).proportion_ci(CONFIDENCE, method="wilson")
    return Measured(hits / of, float(found.low), float(found.high), of)


def alpha(units: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's alpha of nominal labels (Computing Krippendorff's Alpha-Reliability, 2011, section C).

    units: the labels of each pair, by whichever raters. None where no pair has two, or all labels are alike.
    """
    weights: dict[tuple[str, str], float] = defaultdict(float)
    for labels in units:
        for pair, times in Counter(permutations(labels, 2)).items():
            weights[pair] += times / (len(labels) - 1)
    totals: dict[str, float] = defaultdict(float)
    for (one, _), weight in weights.items():
        totals[one] += weight
    n = sum(totals.values())
    observed = sum(weight for (one, other), weight in weights.items() if one != other)
    expected = sum(totals[one] * totals[other] for one, other in permutations(totals, 2))
    return 1 - (n - 1) * observed / expected if expected else None


def _agreement(units: Sequence[Sequence[str]]) -> Measured | None:
    shared = [labels for labels in units if len(labels) > 1]
    value = alpha(shared)
    if value is None:
        return None
    chance = np.random.default_rng(0)
    drawn = [alpha([shared[i] for i in chance.integers(len(shared), size=len(shared))]) for _ in range(RESAMPLES)]
    known = [x for x in drawn if x is not None]
    low, high = np.quantile(known, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Measured(value, float(low), float(high), len(shared))
