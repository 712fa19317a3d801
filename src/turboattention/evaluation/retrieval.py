"""Needles in a real haystack: does the model still find a fact that it read in the compressed part of its cache?

Ten sentences with a secret code each are spread over a real text; then every code is asked for. An answer counts when
all six digits are the most likely tokens, each after the right ones before it: what greedy decoding would write.
"""

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboattention.errors import invalid
from turboattention.evaluation.caches import attention_of, finish, make_cache
from turboattention.evaluation.divergence import negative_log_likelihood
from turboattention.evaluation.stream import CHUNK, feed
from turboattention.evaluation.texts import BUNDLED_TEXTS, encode, leading_tokens, load_text, text_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from turboattention.policy import Policy

NEEDLES = 10
DIGITS = 6
_SENTENCE_END = re.compile(r"(?<=[.;:?!])(?=\s)")  # the space begins the next sentence, as tokenisers have it
NOUNS = (
    "anchor", "basket", "candle", "diamond", "engine", "falcon", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orchid", "piano", "rocket", "saddle", "tunnel", "violin", "window", "zebra",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A needle and the question about it.

    depth: place of the needle's first token as a share of the haystack.
    tokens: question and answer; the last ``answer`` of them are the code's digits.
    """

    depth: float
    tokens: list[int]
    answer: int


@dataclass(frozen=True)
class Haystack:
    """Token numbers of a text with needles, and the questions; with any question it has at most ``length`` tokens."""

    tokens: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class DepthScore:
    """Scores of the needles near one depth (0: start, 1: end of the haystack), averaged over seeds."""

    depth: float
    exact: float
    token_accuracy: float
    gold_nll: float


@dataclass(frozen=True)
class RetrievalResult:
    """Scores of one cache at one length.

    exact: share of codes with every token right.
    token_accuracy: share of single tokens of the codes.
    gold_nll: mean -log p of the right tokens in nats.
    questions: number of codes asked for.
    """

    length: int
    exact: float
    token_accuracy: float
    gold_nll: float
    questions: int
    depths: list[DepthScore]


@dataclass(frozen=True)
class _Answer:
    exact: bool
    token_accuracy: float
    gold_nll: float


def needle_score(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    policy: "str | Policy | None",
    length: int = 2048,
    seeds: Sequence[int] = (0, 1, 2),
    text: str | Path = BUNDLED_TEXTS[0],
) -> RetrievalResult:
    """Ask for ten codes per seed with ordinary attention (``None``) or a policy, in a context of ``length`` tokens.

    text: the haystack, a bundled text or a file.
    """
    if not seeds:
        raise invalid("seeds", "at least one", "none")
    depths: list[list[float]] = [[] for _ in range(NEEDLES)]
    answers: list[list[_Answer]] = [[] for _ in range(NEEDLES)]
    for seed in seeds:
        haystack = make_haystack(tokenizer, length, seed, text)
        for index, answer in enumerate(_ask_all(model, haystack, policy)):
            depths[index].append(haystack.questions[index].depth)
            answers[index].append(answer)
    per_depth = [DepthScore(_mean(depth), *_scores(at_depth)) for depth, at_depth in zip(depths, answers, strict=True)]
    everything = [answer for at_depth in answers for answer in at_depth]
    return RetrievalResult(length, *_scores(everything), len(everything), per_depth)


def make_haystack(
    tokenizer: "PreTrainedTokenizerBase", length: int, seed: int, text: str | Path = BUNDLED_TEXTS[0]
) -> Haystack:
    """Put needles between sentences of ``text``; nouns and codes follow from ``seed``."""
    generator = random.Random(seed)
    nouns = generator.sample(NOUNS, NEEDLES)
    codes = [f"{generator.randrange(10**DIGITS):0{DIGITS}d}" for _ in nouns]
    needles = [
        encode(tokenizer, f" The secret code for the {noun} is {code}.")
        for noun, code in zip(nouns, codes, strict=True)
    ]
    asked = [_question(tokenizer, noun, code) for noun, code in zip(nouns, codes, strict=True)]
    start = leading_tokens(tokenizer)
    room = length - len(start) - sum(map(len, needles)) - max(len(tokens) for tokens, _ in asked)
    least = sum(map(len, needles))
    if room < least:
        raise invalid("length", f"at least {length - room + least} tokens for {NEEDLES} needles", length)

    tokens, filler = list(start), 0
    places: list[int] = []
    for sentence in _sentences(tokenizer, text, room):
        if len(places) < NEEDLES and filler >= (len(places) + 0.5) / NEEDLES * room:
            places.append(len(tokens))
            tokens += needles[len(places) - 1]
        tokens += sentence
        filler += len(sentence)
    # A last sentence longer than the step between needles leaves some for the end.
    for needle in needles[len(places) :]:
        places.append(len(tokens))
        tokens += needle
    questions = [
        Question(place / len(tokens), question, answer) for place, (question, answer) in zip(places, asked, strict=True)
    ]
    return Haystack(tokens, questions)


def _sentences(tokenizer: "PreTrainedTokenizerBase", text: str | Path, room: int) -> list[list[int]]:
    """The first sentences and clauses of a text, ``room`` tokens in all (the last is cut)."""
    sentences, found = [], 0
    for sentence in _SENTENCE_END.split(load_text(text)):
        tokens = encode(tokenizer, sentence)[: room - found]
        sentences.append(tokens)
        found += len(tokens)
        if found == room:
            return sentences
    raise invalid(f"text {text_name(text)}", f"at least {room} tokens", f"{found} tokens", "give a longer text")


def _question(tokenizer: "PreTrainedTokenizerBase", noun: str, code: str) -> tuple[list[int], int]:
    """Tokens of a question with its answer, and how many of them at the end are the code."""
    asked = f"\n\nQuestion: What is the secret code for the {noun}?\nAnswer: The secret code for the {noun} is {code}"
    tokens = encode(tokenizer, asked)
    # Tokenisers differ in how many digits a token holds and in whether the space before is a token of its own.
    answer = next(
        (count for count in range(1, len(tokens)) if str(tokenizer.decode(tokens[-count:])).strip() == code), 0
    )
    if not answer:
        raise invalid("tokenizer", f"tokens that end with the code {code}", str(tokenizer.decode(tokens[-DIGITS:])))
    return tokens, answer


def _ask_all(model: "PreTrainedModel", haystack: Haystack, policy: "str | Policy | None") -> list[_Answer]:
    """Read the haystack once, in chunks as long as a page, and ask every question on a copy of the cache."""
    cache = make_cache(model, policy)
    tokens = torch.tensor([haystack.tokens], device=model.device)
    with attention_of(model, policy):
        for chunk in tokens.split(CHUNK, dim=1):
            feed(model, chunk, cache)
        finish(cache)
        answers = []
        for question in haystack.questions:
            asked = torch.tensor([question.tokens], device=model.device)
            logits = feed(model, asked, copy.deepcopy(cache))
            answers.append(_score(logits, asked, question.answer))
    return answers


def _score(logits: Tensor, asked: Tensor, answer: int) -> _Answer:
    predicted, gold = logits[:, -answer - 1 : -1], asked[:, -answer:]
    right = predicted.argmax(-1) == gold
    nll = negative_log_likelihood(predicted, gold).mean()
    return _Answer(bool(right.all()), float(right.float().mean()), float(nll))


def _scores(answers: Sequence[_Answer]) -> tuple[float, float, float]:
    return (
        _mean([float(answer.exact) for answer in answers]),
        _mean([answer.token_accuracy for answer in answers]),
        _mean([answer.gold_nll for answer in answers]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
