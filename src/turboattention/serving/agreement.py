"""Two answers to the same request, beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass

from turboattention.serving.answer import Answer


@dataclass(frozen=True)
class Agreement:
    """prefix: characters before the first difference; prefix_tokens: likewise tokens, where both sides give them.

    share: prefix over the length of the longer text; 1 for equal texts.
    logprob_differences: candidate minus baseline, nats, for the tokens of the common prefix.
    split_differently: the same characters came as other tokens.
    """

    same: bool
    prefix: int
    share: float
    prefix_tokens: int | None
    logprob_differences: list[float]
    split_differently: bool


def agreement(baseline: Answer, candidate: Answer) -> Agreement:
    """Reads the texts as they are: white space counts."""
    left, right = baseline.text, candidate.text
    prefix = _common(left, right)
    longest = max(len(left), len(right))
    share = prefix / longest if longest else 1.0
    if baseline.tokens is None or candidate.tokens is None:
        return Agreement(left == right, prefix, share, None, [], False)
    common = _common(baseline.tokens, candidate.tokens)
    differences = [
        after - before
        for before, after in zip((baseline.logprobs or [])[:common], (candidate.logprobs or [])[:common], strict=True)
    ]
    return Agreement(left == right, prefix, share, common, differences, _split(baseline, candidate, common))


def _common(left: Sequence[str], right: Sequence[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _split(baseline: Answer, candidate: Answer, common: int) -> bool:
    """Whether the first tokens that differ begin with the same characters and so do the texts after them."""
    left, right = (baseline.tokens or [])[common:], (candidate.tokens or [])[common:]
    if not left or not right:
        return False
    reach = max(len(left[0]), len(right[0]))
    ends = "".join(left)[:reach], "".join(right)[:reach]
    # A token without text, such as a special one, says nothing.
    return bool(left[0]) and bool(right[0]) and left[0] != right[0] and ends[0] == ends[1]
