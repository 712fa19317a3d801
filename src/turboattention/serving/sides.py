"""One side alone: errors, times, speed, lengths, score."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from turboattention.serving.answer import Answer
from turboattention.serving.measure import average, share, spread
from turboattention.serving.prompts import Request
from turboattention.serving.result import Measured, SideResult
from turboattention.serving.scores import Score, right

_EXAMPLES = 3


def side_result(
    answers: Sequence[tuple[Request, Answer]], description: dict[str, str], confidence: float, kind: Score
) -> SideResult:
    """``answers``: all that the side was asked, errors included."""
    good = [answer for _, answer in answers if answer.error is None]
    errors = [answer.error for _, answer in answers if answer.error is not None]
    scored = [right(kind, answer, request) for request, answer in answers if request.references]
    return SideResult(
        description=description,
        answers=len(answers),
        errors=dict(Counter(str(error.kind) for error in errors)),
        error_rate=share(len(errors), len(answers), confidence) or Measured(0.0, 0.0, 1.0, 0),
        error_examples=list(dict.fromkeys(error.message for error in errors))[:_EXAMPLES],
        ttft_ms=spread(ttft_ms(good)),
        tpot_ms=spread(tpot_ms(good)),
        gap_ms=spread([1000 * (after - before) for a in good for before, after in pairwise(a.times_s)]),
        tokens_per_s=_tokens_per_s(good),
        tokens=average([a.completion_tokens for a in good]),
        characters=average([len(a.text) for a in good]),
        score=average(scored),
    )


def ttft_ms(answers: Sequence[Answer]) -> list[float]:
    """Times to the first token, ms."""
    return [1000 * answer.ttft_s for answer in answers if answer.ttft_s is not None]


def tpot_ms(answers: Sequence[Answer]) -> list[float]:
    """Times per token after the first, ms."""
    return [1000 * answer.tpot_s for answer in answers if answer.tpot_s is not None]


def _tokens_per_s(answers: Sequence[Answer]) -> float | None:
    """Over the seconds with a request in flight, so that pauses of a resumed run do not count."""
    busy, end = 0.0, -math.inf
    for start, stop in sorted((a.started_at, a.started_at + a.total_s) for a in answers):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return sum(a.completion_tokens for a in answers) / busy if busy > 0 else None
