"""Task scores of an answer against its references."""

import re
import string
from collections.abc import Callable, Sequence
from typing import Literal

from turboattention.serving.answer import Answer
from turboattention.serving.prompts import Request

Score = Literal["contains", "exact", "normalised"]
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: as the SQuAD scorer does."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _contains(text: str, reference: str) -> bool:
    """Whole words: 4 is not in 42."""
    wanted = normalise(reference)
    return f" {wanted} " in f" {normalise(text)} " if wanted else reference.strip() in text


SCORES: dict[Score, Callable[[str, str], bool]] = {
    "contains": _contains,
    "exact": lambda text, reference: text.strip() == reference.strip(),
    "normalised": lambda text, reference: normalise(text) == normalise(reference),
}


def score(kind: Score, text: str, references: Sequence[str]) -> bool:
    """Whether any of the references fits."""
    return any(SCORES[kind](text, reference) for reference in references)


def right(kind: Score, answer: Answer, request: Request) -> bool:
    """An answer that did not come is wrong; so is every answer to a request without references."""
    return answer.error is None and score(kind, answer.text, request.references)
