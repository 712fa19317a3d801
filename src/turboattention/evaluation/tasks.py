"""Questions with a right answer, answered through a cache: choices by log-probability, free answers greedily.

Rows of a batch are padded on the left. Prompts of choices are read in chunks as long as a page, so that all of them but
the open page is compressed when a choice is scored; free answers read the prompt at once, as serving does, and every
later token through the compressed cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboattention.errors import invalid
from turboattention.evaluation.caches import attention_of, finish, held_bytes, held_values, make_cache
from turboattention.evaluation.divergence import negative_log_likelihood
from turboattention.evaluation.stream import CHUNK, Progress, feed, policy_name
from turboattention.evaluation.texts import encode, leading_tokens
from turboattention.integrations.models import LoadedModel, quiet

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from turboattention.policy import Policy


@dataclass(frozen=True)
class Question:
    """A prompt, and what should follow it.

    prompt: plain text; markup of a chat is part of it.
    expected: the right choice, or whatever judges a free answer.
    choices: texts that could follow the prompt, each with its leading space; without any the model writes its answer.
    """

    name: str
    prompt: str
    expected: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a model answered: a choice or its own text, and the tokens of prompt and answer."""

    text: str
    tokens: int


@torch.inference_mode()
def choose(
    loaded: LoadedModel,
    questions: Sequence[Question],
    policy: "str | Policy | None" = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> list[Answer]:
    """The choice of each question with the largest log-probability, summed over its tokens.

    batch: questions read together; each is then scored with all its choices.
    """
    for question in questions:
        if len(question.choices) < 2:
            raise invalid(f"choices of {question.name}", "at least 2", len(question.choices))
    prompts = [_tokens(loaded, question) for question in questions]
    choices = [[encode(loaded.tokenizer, choice) for choice in question.choices] for question in questions]
    for question, prompt, texts in zip(questions, prompts, choices, strict=True):
        if len(prompt) < 2 or not all(texts):
            raise invalid(f"question {question.name}", "a prompt of two tokens or more and choices with text", "less")
        _check_length(loaded, question, len(prompt) + max(map(len, texts)))
    answers: dict[int, Answer] = {}
    for rows in _batches(prompts, batch):
        scores = _scores(loaded.model, [prompts[row] for row in rows], [choices[row] for row in rows], policy)
        for row, found in zip(rows, scores, strict=True):
            if not bool(torch.isfinite(found).all()):
                raise invalid(f"scores of {questions[row].name}", "finite numbers", found.tolist(), "try float32")
            best = int(found.argmax())
            answers[row] = Answer(questions[row].choices[best], len(prompts[row]) + len(choices[row][best]))
        _tell(progress, len(answers), len(questions), policy)
    return [answers[row] for row in range(len(questions))]


@torch.inference_mode()
def write(
    loaded: LoadedModel,
    questions: Sequence[Question],
    policy: "str | Policy | None" = None,
    batch: int = 8,
    new_tokens: int = 200,
    progress: Progress | None = None,
) -> list[Answer]:
    """The most likely text after each prompt, token by token, until the model ends it or after ``new_tokens``."""
    prompts = [_tokens(loaded, question) for question in questions]
    for question, prompt in zip(questions, prompts, strict=True):
        _check_length(loaded, question, len(prompt) + new_tokens)
    ends = _ends(loaded)
    answers: dict[int, Answer] = {}
    for rows in _batches(prompts, batch):
        tokens, mask = _pad([prompts[row] for row in rows], loaded.model.device)
        with quiet(), attention_of(loaded.model, policy):
            written = loaded.model.generate(  # type: ignore[operator]  # nn.Module.__getattr__ hides the method
                input_ids=tokens,
                attention_mask=mask,
                past_key_values=make_cache(loaded.model, policy),
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
            )
        for row, added in zip(rows, written[:, tokens.shape[1] :].tolist(), strict=True):
            kept = added[: next((index for index, token in enumerate(added) if token in ends), len(added))]
            text = str(loaded.tokenizer.decode(kept, skip_special_tokens=True))
            answers[row] = Answer(text, len(prompts[row]) + len(kept))
        _tell(progress, len(answers), len(questions), policy)
    return [answers[row] for row in range(len(questions))]


def bits_per_value(model: "PreTrainedModel", policy: "str | Policy | None", tokens: int) -> float:
    """Bits of every byte that the cache of one sequence of ``tokens`` tokens holds, per value of K and V."""
    cache = make_cache(model, policy)
    row = (torch.arange(tokens, device=model.device) % model.config.get_text_config().vocab_size)[None]
    with attention_of(model, policy):
        for chunk in row.split(CHUNK, dim=1):
            feed(model, chunk, cache)
    finish(cache)
    return 8.0 * held_bytes(cache) / held_values(cache)


def _scores(
    model: "PreTrainedModel",
    prompts: Sequence[list[int]],
    choices: Sequence[Sequence[list[int]]],
    policy: "str | Policy | None",
) -> list[Tensor]:
    """For each prompt log p of its choices in nats, float32 ``[choices]``."""
    # The last token of a prompt is read with each choice: it predicts the choice's first token.
    tokens, mask = _pad([prompt[:-1] for prompt in prompts], model.device)
    tails = [prompt[-1:] + choice for prompt, texts in zip(prompts, choices, strict=True) for choice in texts]
    owners = torch.tensor([row for row, texts in enumerate(choices) for _ in texts], device=model.device)
    lengths = torch.tensor([len(tail) for tail in tails], device=model.device)
    asked = torch.nn.utils.rnn.pad_sequence([torch.tensor(tail) for tail in tails], True).to(model.device)
    cache = make_cache(model, policy)
    with attention_of(model, policy):
        for start in range(0, tokens.shape[1], CHUNK):
            stop = min(start + CHUNK, tokens.shape[1])
            _forward(model, tokens[:, start:stop], mask[:, :stop], cache, keep=1)
        finish(cache)
        cache.batch_select_indices(owners)
        # Padding at the end of a choice comes after all that counts and needs no mask.
        logits = _forward(model, asked, torch.cat([mask[owners], torch.ones_like(asked)], 1), cache)
    nll = negative_log_likelihood(logits[:, :-1], asked[:, 1:])
    counted = torch.arange(1, asked.shape[1], device=model.device) < lengths[:, None]
    scores = -nll.masked_fill(~counted, 0.0).sum(1)
    return list(scores.split([len(texts) for texts in choices]))


def _forward(model: "PreTrainedModel", tokens: Tensor, mask: Tensor, cache: "Cache", keep: int = 0) -> Tensor:
    """Logits of the last ``keep`` of ``tokens`` [rows, positions] (0: all); ``mask`` also covers what is cached."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
    logits: Tensor = model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=keep,
    ).logits  # fmt: skip
    return logits


def _pad(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token numbers with zeros on the left and the mask with ones where tokens are, both int64 ``[rows, longest]``."""
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens, mask


def _batches(prompts: Sequence[list[int]], batch: int) -> Iterator[list[int]]:
    """Row numbers, prompts of like length together; the longest first, so that a lack of memory shows at once."""
    if batch < 1:
        raise invalid("batch", "at least 1", batch)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def _tokens(loaded: LoadedModel, question: Question) -> list[int]:
    return leading_tokens(loaded.tokenizer) + encode(loaded.tokenizer, question.prompt)


def _check_length(loaded: LoadedModel, question: Question, tokens: int) -> None:
    if tokens > loaded.context_length:
        raise invalid(f"question {question.name}", f"at most {loaded.context_length} tokens with its answer", tokens)


def _ends(loaded: LoadedModel) -> list[int]:
    """Tokens that end an answer: plain text ends with another one than a turn of a chat."""
    settings = loaded.model.generation_config
    named = getattr(settings, "eos_token_id", None)
    found = [*(named if isinstance(named, list) else [named]), loaded.tokenizer.eos_token_id]
    found.append(loaded.tokenizer.pad_token_id)
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def _tell(progress: Progress | None, done: int, total: int, policy: "str | Policy | None") -> None:
    if progress is not None:
        progress(done, total, "16-bit" if policy is None else policy_name(policy))
