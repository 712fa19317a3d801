"""Needles: how the haystack is built and how answers are counted."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from turboattention.errors import InvalidInputError
from turboattention.evaluation.retrieval import NEEDLES, make_haystack, needle_score
from turboattention.evaluation.texts import load_text

NEEDLE = re.compile(r" The secret code for the (\w+) is (\d{6})\.")


@pytest.mark.parametrize("length", [2048, 6000])
def test_haystack(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    haystack = make_haystack(tokenizer, length, seed=0)
    text = tokenizer.decode(haystack.tokens)
    needles = NEEDLE.findall(text)
    assert len(dict(needles)) == NEEDLES
    # What is left without the needles is the text, and no needle stands inside a sentence (the text's end is cut).
    assert load_text("state-of-the-union-1981").startswith(NEEDLE.sub("", text))
    places = [match.start() for match in NEEDLE.finditer(text)]
    assert all(text[place - 1] in ".;:?!" for place in places[:-1])
    assert max(len(haystack.tokens) + len(question.tokens) for question in haystack.questions) == length
    for (noun, code), question, match in zip(needles, haystack.questions, NEEDLE.finditer(text), strict=True):
        asked = tokenizer.decode(question.tokens)
        assert asked.count(noun) == 2
        assert asked.endswith(code)
        assert tokenizer.decode(question.tokens[-question.answer :]) == code
        assert question.depth == match.start() / len(text)  # one token is one character


def test_needles_are_spread_evenly(tokenizer: PreTrainedTokenizerFast) -> None:
    depths = [question.depth for question in make_haystack(tokenizer, 14_000, seed=0).questions]
    assert depths == pytest.approx([(index + 0.5) / NEEDLES for index in range(NEEDLES)], abs=0.04)


def test_seed_decides(tokenizer: PreTrainedTokenizerFast) -> None:
    assert make_haystack(tokenizer, 2048, 1) == make_haystack(tokenizer, 2048, 1)
    assert make_haystack(tokenizer, 2048, 1) != make_haystack(tokenizer, 2048, 2)


@pytest.mark.parametrize("policy", [None, "turbo4"])
def test_scores_of_a_random_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, policy: str | None
) -> None:
    result = needle_score(model, tokenizer, policy, length=2048, seeds=[0, 1])
    assert result.questions == 2 * NEEDLES
    assert result.exact == 0.0
    assert 0.0 <= result.token_accuracy < 0.5
    assert result.gold_nll == pytest.approx(5.3, abs=1.0)  # ln 200: it knows nothing
    assert len(result.depths) == NEEDLES
    assert result.gold_nll == pytest.approx(sum(depth.gold_nll for depth in result.depths) / NEEDLES)
    assert [depth.depth for depth in result.depths] == sorted(depth.depth for depth in result.depths)


def test_a_model_that_knows_the_codes_scores_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that foresees every token, except in one question its last digit: 9 of 10 codes, 59 of 60 digits."""
    wrong = make_haystack(tokenizer, 2048, 0).questions[3].tokens

    def foresee(model: object, tokens: torch.Tensor, cache: object) -> torch.Tensor:
        answer = tokens.roll(-1, dims=1)
        if tokens[0].tolist() == wrong:
            answer[0, -2] = 0
        return 100.0 * torch.nn.functional.one_hot(answer, 200).float()

    monkeypatch.setattr("turboattention.evaluation.retrieval.feed", foresee)
    result = needle_score(model, tokenizer, None, length=2048, seeds=[0])
    assert result.exact == 0.9
    assert result.token_accuracy == pytest.approx(59 / 60)
    assert [depth.exact for depth in result.depths] == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    assert result.gold_nll == pytest.approx(100.0 / 60, rel=1e-4)


def test_bad_input(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    with pytest.raises(InvalidInputError, match="length: expected at least 9"):
        make_haystack(tokenizer, 500, 0)
    with pytest.raises(InvalidInputError, match=r"text text.txt: expected at least \d+ tokens, received 4"):
        make_haystack(tokenizer, 8192, 0, text_file)
    with pytest.raises(InvalidInputError, match="seeds: expected at least one"):
        needle_score(model, tokenizer, None, seeds=[])
