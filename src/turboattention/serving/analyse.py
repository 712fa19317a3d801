"""Answers to an ABResult: each side alone, the pairs, the limits."""

from collections.abc import Mapping, Sequence
from typing import Any

from turboattention.serving.answer import SIDES, Answer, SideName
from turboattention.serving.limits import Limits, verdict
from turboattention.serving.pairs import Pair, curves, flips, mixed_tokens, pair_result
from turboattention.serving.prompts import BadLine, Request
from turboattention.serving.result import ABResult
from turboattention.serving.scores import Score
from turboattention.serving.sides import side_result


def analyse(
    requests: Sequence[Request],
    answers: Mapping[tuple[str, SideName], Answer],
    limits: Limits,
    environment: dict[str, Any],
    settings: dict[str, Any],
    bad_lines: Sequence[BadLine] = (),
    remarks: Sequence[str] = (),
    stopped: str = "",
    kind: Score = "contains",
) -> ABResult:
    """``stopped``: why the run is partial, "" for a whole one; ``kind``: the score that counts."""
    by_side = {side: [(r, answers[r.id, side]) for r in requests if (r.id, side) in answers] for side in SIDES}
    candidates = {request.id: answer for request, answer in by_side["candidate"]}
    pairs = [Pair.of(r, before, candidates[r.id]) for r, before in by_side["baseline"] if r.id in candidates]
    mixed = mixed_tokens(pairs)
    baseline, candidate = (
        side_result(by_side[side], settings.get(side, {}), limits.confidence, kind) for side in SIDES
    )
    paired = pair_result(pairs, limits.confidence, kind, comparable=not mixed)
    checks = limits.checks(candidate, paired, comparable=not mixed)
    return ABResult(
        environment=environment,
        settings=settings,
        requests=len(requests),
        bad_lines=[{"line": bad.number, "reason": bad.reason} for bad in bad_lines],
        stopped=stopped,
        remarks=[*remarks, *_remarks(answers, mixed)],
        baseline=baseline,
        candidate=candidate,
        paired=paired,
        checks=checks,
        verdict=verdict(checks),
        flips=flips(pairs, kind),
        curves=curves(pairs),
    )


def _remarks(answers: Mapping[tuple[str, SideName], Answer], mixed: str) -> list[str]:
    remarks = []
    if mixed:
        remarks.append(
            f"Mixed tokenizers or prompt templates ({mixed}): tokens, log-probabilities and times per token are not "
            "compared; lengths are characters."
        )
    for side in SIDES:
        if any(a.side == side and a.counted == "pieces" and a.completion_tokens for a in answers.values()):
            remarks.append(
                f"{side}: the server does not count tokens; pieces of its stream are counted, which may hold several."
            )
    return remarks
