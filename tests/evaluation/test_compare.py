"""The whole comparison on a tiny model, and its parts for plots."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from turboattention.errors import InvalidInputError
from turboattention.evaluation.compare import compare, kl_by_position, kl_histogram
from turboattention.evaluation.environment import environment
from turboattention.evaluation.generation import continuation
from turboattention.evaluation.speed import measure_speed
from turboattention.integrations.models import LoadedModel
from turboattention.policy import Policy


def test_result(loaded: LoadedModel, text_file: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    texts = [text_file, "persuasion"]
    result = compare(loaded, texts, ["fp16", "turbo4"], tokens=256, seed=3, progress=lambda *step: steps.append(step))

    assert [done for done, _, _ in steps] == list(range(1, steps[0][1] + 1))
    assert result.model == "tiny"
    assert result.text == ["text.txt", "persuasion"]
    assert result.tokens == 256
    values = 2 * 2 * 2 * 256 * 64  # K and V, layers, rows, tokens, head_dim
    assert result.baseline.kv_bytes == 2 * values
    assert result.baseline.perplexity_ci.low < result.baseline.perplexity < result.baseline.perplexity_ci.high

    exact, turbo = result.candidates
    assert exact.preset, turbo.preset == ("fp16", "turbo4")
    assert exact.continuation == result.baseline.continuation
    assert exact.kl_mean < 1e-6 < turbo.kl_mean
    assert exact.top1_agreement > 0.99
    assert turbo.bits_per_value == 8 * turbo.kv_bytes / values
    assert turbo.compression == 16 / turbo.bits_per_value
    assert turbo.delta_nll == pytest.approx(math.log(turbo.perplexity / result.baseline.perplexity), abs=1e-6)
    assert turbo.kl_ci.low <= turbo.kl_mean <= turbo.kl_ci.high
    assert turbo.kl_by_position.x == [0.0, 64.0, 128.0, 192.0]
    for speed in (result.baseline, exact, turbo):
        assert speed.prefill_tokens_per_s > 0
        assert speed.decode_ms_per_token > 0

    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["schema"] == 1
    assert data["environment"]["dtype"] == "float32"


def test_measurement_repeats(loaded: LoadedModel, text_file: Path) -> None:
    first, second = (compare(loaded, [text_file], Policy.from_preset("turbo3"), tokens=128) for _ in range(2))
    assert first.candidates[0].kl_ci == second.candidates[0].kl_ci
    assert first.candidates[0].perplexity == second.candidates[0].perplexity


def test_bad_input(loaded: LoadedModel, text_file: Path) -> None:
    with pytest.raises(InvalidInputError, match="tokens: expected at least 128"):
        compare(loaded, [text_file], tokens=127)
    with pytest.raises(InvalidInputError, match="preset: expected one of fp16"):
        compare(loaded, [text_file], ["turbo5"], tokens=128)
    with pytest.raises(InvalidInputError, match="the model's context is 16384"):
        compare(loaded, [text_file], tokens=16_384)
    with pytest.raises(InvalidInputError, match="model: expected one of smollm2-135m"):
        compare("no-such-model", [text_file])


def test_speed_states_its_context(loaded: LoadedModel) -> None:
    prompt = torch.randint(2, 200, (1, 100))
    speeds = measure_speed(loaded.model, prompt, [None, "turbo4"], steps=3, repeats=1)
    assert [speed.context for speed in speeds] == [100, 100]


def test_continuation_is_greedy(loaded: LoadedModel) -> None:
    prompt = torch.randint(2, 100, (1, 40))
    tokens = prompt
    for _ in range(8):
        with torch.no_grad():
            tokens = torch.cat([tokens, loaded.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert isinstance(loaded.tokenizer, PreTrainedTokenizerFast)
    expected = loaded.tokenizer.decode(tokens[0, 40:], skip_special_tokens=True)
    assert continuation(loaded.model, loaded.tokenizer, prompt, new_tokens=8) == expected


def test_kl_by_position_is_the_mean_over_rows_and_bins() -> None:
    kl = torch.arange(300.0).expand(2, 300) + torch.tensor([[0.0], [2.0]])
    series = kl_by_position(kl, width=100)
    assert series.x == [0.0, 100.0, 200.0]
    assert series.y == [50.5, 150.5, 250.5]
    assert kl_by_position(kl[:, :70]).y == [32.5, 67.5]


def test_kl_histogram_counts_everything() -> None:
    """Bins of a third of a decade from 1e-8; zero and values beyond 100 count in the outermost bins."""
    series = kl_histogram(torch.tensor([[0.0, 1e-12, 2e-4, 2e-4, 0.5, 1e5, 200.0, 99.0]]))
    assert len(series.x) == len(series.y) == 30
    assert series.x[0] == -8.0
    counts = {round(x, 2): y * 8 for x, y in zip(series.x, series.y, strict=True) if y}
    assert counts == {-8.0: 2, -4.0: 2, -0.33: 1, 1.67: 3}


def test_environment_is_complete() -> None:
    found = environment(torch.bfloat16)
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["turboattention"]
    assert found["dtype"] == "bfloat16"
    assert found["gpu"] is None
    assert found["cpu"]
    json.dumps(found)
