"""A preset or policy on a model in this process as one side, measured token by token."""

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch

from turboattention.errors import TurboAttentionError, invalid
from turboattention.evaluation.caches import attention_of, make_cache
from turboattention.integrations.models import LoadedModel, quiet
from turboattention.policy import Policy, asdict_policy
from turboattention.serving.answer import Answer, Failure, SideName
from turboattention.serving.prompts import Request

ORDINARY = "16-bit"


@dataclass
class LocalModel:
    """Both local sides share the weights, so only one of them computes at a time."""

    loaded: LoadedModel
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass
class LocalSide:
    """policy: None for the model's own attention and a 16-bit cache."""

    name: SideName
    shared: LocalModel
    policy: str | Policy | None
    stopped: Event = field(default_factory=Event)

    def describe(self) -> dict[str, str]:
        name, policy = self.shared.loaded.name, self.policy
        if policy is None or isinstance(policy, str):
            return {"kind": "local", "policy": policy or ORDINARY, "model": name}
        digest = hashlib.sha256(json.dumps(asdict_policy(policy), sort_keys=True).encode()).hexdigest()
        return {"kind": "local", "policy": policy.name, "sha256": digest, "model": name}

    async def prepare(self, warm_up: list[Request]) -> list[str]:
        for request in warm_up:
            answer = await self.ask(request)
            if answer.error is not None:
                raise invalid(f"--{self.name}", "an answer to the warm-up request", answer.error.message)
        return []

    async def ask(self, request: Request) -> Answer:
        async with self.shared.busy:
            try:
                return await asyncio.to_thread(self._answer, request)
            except asyncio.CancelledError:
                self.stopped.set()  # the thread looks at it after each token
                raise

    async def close(self) -> None:
        self.stopped.set()

    def _answer(self, request: Request) -> Answer:
        started_at, start = time.time(), time.perf_counter()
        loaded = self.shared.loaded
        ids: list[int] = []
        logprobs: list[float] = []
        times: list[float] = []
        try:
            prompt_tokens = encode_request(loaded, request).shape[1]
            for token, logprob in greedy(loaded, self.policy, request, self.stopped):
                ids.append(token)
                logprobs.append(logprob)
                times.append(time.perf_counter() - start)
        except TurboAttentionError as error:
            failure = Failure("refused", str(error))
            return Answer(request.id, self.name, "", started_at, time.perf_counter() - start, [], error=failure)
        tokenizer = loaded.tokenizer
        ended = bool(ids) and ids[-1] in end_tokens(loaded.model)
        written = ids[:-1] if ended else ids
        return Answer(
            id=request.id,
            side=self.name,
            text=str(tokenizer.decode(written, skip_special_tokens=True)),
            started_at=started_at,
            total_s=time.perf_counter() - start,
            times_s=times,
            completion_tokens=len(ids),
            counted="usage",
            prompt_tokens=prompt_tokens,
            finish="stop" if ended else "length",
            tokens=[str(tokenizer.decode([token])) for token in written],
            logprobs=logprobs[: len(written)],
        )


def greedy(
    loaded: LoadedModel, policy: str | Policy | None, request: Request, stopped: Event | None = None
) -> Iterator[tuple[int, float]]:
    """The most likely tokens, the end included, each with its log-probability; ends early when ``stopped`` is set.

    policy: None for the model's own attention. Raises InvalidInputError for a prompt that does not fit.
    """
    model: Any = loaded.model
    tokens = encode_request(loaded, request).to(model.device)
    cache, ends = make_cache(model, policy), end_tokens(model)
    with quiet(), attention_of(model, policy):
        for _ in range(request.max_tokens):
            with torch.inference_mode():
                logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                tokens = logits.argmax(-1, keepdim=True)
                token = int(tokens)
                logprob = float(logits.float().log_softmax(-1)[0, token])
            yield token, logprob
            if token in ends or (stopped is not None and stopped.is_set()):
                return


def end_tokens(model: Any) -> set[int]:
    """Those that end an answer."""
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else {found} - {None}


def encode_request(loaded: LoadedModel, request: Request) -> torch.Tensor:
    """Token numbers, int64 ``[1, tokens]``; messages go through the model's chat template."""
    tokenizer: Any = loaded.tokenizer
    if request.messages and not tokenizer.chat_template:
        raise invalid("messages", "a model with a chat template", loaded.name)
    # A chat template writes the special tokens itself.
    text = (
        tokenizer.apply_chat_template(request.chat(), tokenize=False, add_generation_prompt=True)
        if request.messages
        else request.prompt
    )
    ids: torch.Tensor = tokenizer(text, add_special_tokens=not request.messages, return_tensors="pt")["input_ids"]
    most = loaded.context_length - request.max_tokens
    if not 1 <= ids.shape[1] <= most:
        raise invalid("prompt", f"1 to {most} tokens (the model's context without the answer)", ids.shape[1])
    return ids
