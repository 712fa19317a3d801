"""Presets and policies as sides: the tokens that transformers' own generation gives, with their times."""

import asyncio
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("httpx2")

from tiny import CONTEXT, character_tokenizer, tiny_llama

from turboattention.errors import InvalidInputError
from turboattention.evaluation.generation import continuation
from turboattention.integrations.models import LoadedModel
from turboattention.policy import Policy
from turboattention.serving.choose import Spec, make_sides
from turboattention.serving.limits import Limits
from turboattention.serving.prompts import Request
from turboattention.serving.session import Settings, run_ab

PROMPT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 3


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny_llama(spread=0.2), character_tokenizer(), "tiny", CONTEXT)


def test_local_sides(loaded: LoadedModel, tmp_path: Path) -> None:
    policy = Policy("mine", Policy.from_preset("turbo2").cache)
    policy.save(tmp_path / "policy.json")
    specs = [Spec("baseline", "preset:16-bit"), Spec("candidate", f"policy:{tmp_path / 'policy.json'}")]
    requests = [Request(f"q{i}", PROMPT[i:], max_tokens=12) for i in range(3)]
    requests.append(Request("long", PROMPT * 100, max_tokens=12))
    requests.append(Request("chat", "", ({"role": "user", "content": "hi"},)))
    settings = Settings(warm_up=1)
    sides = make_sides(specs, settings, "auto", requests, lambda: loaded)
    result = run_ab(tmp_path / "run", sides, requests, Limits(), settings).result
    prompt = torch.tensor([loaded.tokenizer(PROMPT)["input_ids"]])
    asked = asyncio.run(sides[1].ask(requests[0]))
    assert asked.completion_tokens == 1, "a side that is closed stops at the next token"
    fresh = make_sides(specs, settings, "auto", requests, lambda: loaded)
    for side, chosen in zip(fresh, (None, policy), strict=True):
        answer = asyncio.run(side.ask(requests[0]))
        assert answer.text == continuation(loaded.model, loaded.tokenizer, prompt, chosen, 12)
        assert answer.tokens is not None
        assert "".join(answer.tokens) == answer.text
        assert answer.logprobs is not None
        assert all(-10 < value <= 0 for value in answer.logprobs)
        assert answer.prompt_tokens == len(PROMPT)
        assert answer.times_s == sorted(answer.times_s)
    assert result.baseline.errors == result.candidate.errors == {"refused": 2}
    assert "chat template" in " ".join(result.baseline.error_examples)
    assert result.paired.pairs == 3
    assert result.settings["candidate"]["policy"] == "mine"
    assert len(result.settings["candidate"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        (Spec("baseline", "preset:turbo5"), {}, "preset: expected one of"),
        (Spec("baseline", "preset:turbo4", model="x"), {}, "a preset's model is --model"),
        (Spec("baseline", "preset:turbo4"), {"temperature": 0.5}, "--temperature: expected 0"),
        (Spec("baseline", "turbo4"), {}, "--baseline: expected http"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(spec: Spec, options: dict[str, float], words: str) -> None:
    def load() -> LoadedModel:
        raise AssertionError("the model was loaded")

    with pytest.raises(InvalidInputError, match=words):
        make_sides([spec], Settings(**options), "auto", [Request("a", "x")], load)  # type: ignore[arg-type]
