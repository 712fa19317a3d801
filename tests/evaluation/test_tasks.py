"""Questions answered through caches: batches with padding against single questions, choices against plain attention."""

import pytest
import torch
from tiny import CONTEXT, character_tokenizer, tiny_llama
from torch import Tensor

from turboattention.errors import InvalidInputError
from turboattention.evaluation.tasks import Question, _scores, bits_per_value, choose, write
from turboattention.evaluation.texts import encode, load_text
from turboattention.integrations.models import LoadedModel

TEXT = load_text("persuasion")
CHOICES = (" Anne went on", " Elizabeth,", " the house of Mrs Smith")
# One prompt is so much shorter than the longest that its row of a batch begins with whole chunks of padding.
LENGTHS = (300, 7, 150, 64, 2)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny_llama(spread=0.1), character_tokenizer(), "tiny", CONTEXT)


def prompts() -> list[str]:
    return [TEXT[1000 * index : 1000 * index + length] for index, length in enumerate(LENGTHS)]


def plain_scores(loaded: LoadedModel, prompt: str) -> Tensor:
    """log p of each choice by one forward without cache, batch and padding."""
    start, scores = encode(loaded.tokenizer, prompt), []
    for choice in CHOICES:
        tokens = torch.tensor([start + encode(loaded.tokenizer, choice)])
        with torch.inference_mode():
            logs = loaded.model(tokens, use_cache=False).logits[0].log_softmax(-1)
        scores.append(logs[len(start) - 1 : -1].gather(1, tokens[0, len(start) :, None]).sum())
    return torch.stack(scores)


@torch.inference_mode()
def batch_scores(loaded: LoadedModel, policy: str | None) -> list[Tensor]:
    rows = [encode(loaded.tokenizer, prompt) for prompt in prompts()]
    choices = [encode(loaded.tokenizer, choice) for choice in CHOICES]
    return _scores(loaded.model, rows, [choices] * len(rows), policy)


@pytest.mark.parametrize("policy", [None, "fp16"])
def test_scores_of_a_padded_batch(loaded: LoadedModel, policy: str | None) -> None:
    for found, prompt in zip(batch_scores(loaded, policy), prompts(), strict=True):
        torch.testing.assert_close(found, plain_scores(loaded, prompt), rtol=1e-4, atol=1e-3)


def test_choices_are_scored_through_compressed_pages(loaded: LoadedModel) -> None:
    """Coarser codes change the scores of long prompts more; what fits into the open page is exact but for float16."""
    errors = {}
    for policy in ("int8", "turbo2"):
        found = batch_scores(loaded, policy)
        errors[policy] = [
            float((row - plain_scores(loaded, p)).abs().max()) for row, p in zip(found, prompts(), strict=True)
        ]
    assert 0.0 < errors["int8"][0] < errors["turbo2"][0]
    assert errors["turbo2"][0] > 0.1
    assert torch.isfinite(torch.tensor(errors["turbo2"])).all()


def test_choose_takes_the_most_likely(loaded: LoadedModel) -> None:
    questions = [Question(str(index), prompt, CHOICES[0], CHOICES) for index, prompt in enumerate(prompts())]
    # A question with fewer choices than its neighbours: rows of a batch need not have the same number.
    questions[2] = Question("2", questions[2].prompt, CHOICES[1], CHOICES[1:])
    expected = []
    for question in questions:
        scores = dict(zip(CHOICES, plain_scores(loaded, question.prompt).tolist(), strict=True))
        expected.append(max(question.choices, key=scores.__getitem__))
    for batch in (1, 2, 8):
        answers = choose(loaded, questions, batch=batch)
        assert [answer.text for answer in answers] == expected
        assert answers[0].tokens == LENGTHS[0] + len(expected[0])  # one token is one character


@pytest.mark.parametrize("policy", [None, "fp16", "turbo4"])
def test_answers_of_a_padded_batch(loaded: LoadedModel, policy: str | None) -> None:
    """Left padding changes no answer: with our cache as far as pages hold the same tokens, here before one is full."""
    kept = LENGTHS if policy != "turbo4" else (40, 7, 2)
    asked = [Question(str(n), TEXT[7 * n : 7 * n + n], "") for n in kept]
    together = write(loaded, asked, policy, batch=8, new_tokens=20)
    single = [answer for question in asked for answer in write(loaded, [question], policy, new_tokens=20)]
    assert together == single
    assert len({answer.text for answer in together}) > 1


def test_an_answer_ends_at_the_end_token(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a batch where another answer goes on, and without the end token in its text."""
    prompt = torch.tensor([encode(loaded.tokenizer, TEXT[:80])])
    written = loaded.model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 80:].tolist()
    count = written.index(written[4])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [written[4]])
    cut, other = write(loaded, [Question("", TEXT[:80], ""), Question("", TEXT[500:509], "")], new_tokens=12)
    assert cut.tokens == 80 + count
    assert cut.text == loaded.tokenizer.decode(written[:count], skip_special_tokens=True)
    assert other.tokens > 9 + count


def test_steps_are_told_in_the_order_of_batches(loaded: LoadedModel) -> None:
    told: list[tuple[int, int, str]] = []
    questions = [Question("", TEXT[:n], "") for n in (5, 6, 7)]
    write(loaded, questions, "turbo4", batch=2, new_tokens=1, progress=lambda *step: told.append(step))
    assert told == [(2, 3, "turbo4"), (3, 3, "turbo4")]


def test_bits_count_every_byte(loaded: LoadedModel) -> None:
    sizes = [bits_per_value(loaded.model, policy, 500) for policy in (None, "int8", "turbo4", "turbo2")]
    assert sizes[0] == 16.0
    assert sizes == sorted(sizes, reverse=True)
    # 448 tokens in pages of 4 bits and their scales, 52 tokens and the sink in 16 bits.
    assert sizes[2] == pytest.approx((448 * 4.25 + 53 * 16) / 500, abs=0.05)


def test_scores_that_are_no_numbers_are_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = loaded.model.lm_head.weight
    monkeypatch.setattr(loaded.model.lm_head, "weight", torch.nn.Parameter(torch.full_like(weight, torch.nan)))
    with pytest.raises(InvalidInputError, match="scores of q: expected finite numbers"):
        choose(loaded, [Question("q", "text", "a", ("a", "b"))])


def test_bad_input(loaded: LoadedModel) -> None:
    with pytest.raises(InvalidInputError, match="choices of q: expected at least 2, received 0"):
        choose(loaded, [Question("q", "text", "")])
    with pytest.raises(InvalidInputError, match="question q: expected a prompt of two tokens"):
        choose(loaded, [Question("q", "t", "a", ("a", "b"))])
    with pytest.raises(InvalidInputError, match="question q: expected at most 16384 tokens"):
        write(loaded, [Question("q", "t", "")], new_tokens=CONTEXT)
    with pytest.raises(InvalidInputError, match="batch: expected at least 1, received 0"):
        write(loaded, [Question("q", "t", "")], batch=0)
