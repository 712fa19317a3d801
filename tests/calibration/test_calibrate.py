"""The whole calibration on a tiny model: target met, the same twice, gone on with after a stop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from turboattention.calibration.calibrate import Calibration, calibrate
from turboattention.calibration.settings import Settings
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.evaluation.stream import stream
from turboattention.integrations.models import LoadedModel
from turboattention.policy import Policy

SETTINGS = Settings(tokens=1024, window=256, held_out_tokens=256, probes=4, curve=False)


def without_times(found: Calibration) -> tuple[Policy, dict[str, Any]]:
    data = found.result.to_dict()
    data.pop("seconds")
    data["environment"].pop("date")
    return found.policy, data


def test_a_target_of_loss(loaded: LoadedModel, texts: list[Path], tmp_path: Path) -> None:
    found = calibrate(loaded, texts, "max-kl=0.01", settings=SETTINGS)
    result = found.result
    assert result.tuning.kl <= 0.01
    assert result.chosen.name == "calibrated max-kl=0.01"
    assert [x.name for x in result.points[1:]] == ["turbo4", "turbo3", "turbo2"]
    assert result.spearman is not None
    assert len(result.depth) == 2
    assert len(result.heads) == 4
    assert all(x.seen <= x.bound for x in result.heads)
    assert sum(x.loss_share for x in result.layers) == pytest.approx(1.0)
    # The file is what was measured.
    found.policy.save(tmp_path / "policy.json")
    policy = Policy.load(tmp_path / "policy.json")
    assert policy == found.policy
    from turboattention.evaluation.texts import windows

    _, (again,) = stream(loaded.model, windows(loaded.tokenizer, texts, 256), [policy])
    assert float(again.kl.double().mean()) == pytest.approx(result.chosen.kl, rel=1e-6)
    assert 8 * again.kv_bytes / again.num_values == pytest.approx(result.chosen.bits_per_value)


@pytest.mark.parametrize("per", ["head", "layer"])
def test_a_target_of_size(per: str, loaded: LoadedModel, texts: list[Path]) -> None:
    settings = replace(SETTINGS, per=per, curve=True, probes=0)
    result = calibrate(loaded, texts, "bits=4.5", settings=settings).result
    assert 4.3 < result.chosen.bits_per_value <= 4.5
    assert result.within_target
    assert result.spearman is None
    kinds = [x.kind for x in result.points]
    assert {"chosen", "uniform", "calibrated", "rule", "paper", "kivi"} == set(kinds)
    assert result.chosen.kl < next(x.kl for x in result.points if x.name == "turbo2")
    with pytest.raises(InvalidInputError, match=r"^target bits: expected at least"):
        calibrate(loaded, texts, "bits=2", settings=settings)


def test_out_of_reach(loaded: LoadedModel, texts: list[Path]) -> None:
    with pytest.raises(InvalidInputError, match=r"^target: expected a loss that the cache formats can reach"):
        calibrate(loaded, texts, "max-kl=1e-11", settings=replace(SETTINGS, probes=0))


def test_the_same_twice_and_after_a_stop(loaded: LoadedModel, texts: list[Path], tmp_path: Path) -> None:
    whole = without_times(calibrate(loaded, texts, "max-kl=0.02", settings=SETTINGS))
    state = tmp_path / "state.json"

    class StopError(Exception):
        pass

    for label in ("sensitivities", "probes", "tuning", "held-out text"):
        calls = 0

        def stop(done: int, total: int, text: str, label: str = label) -> None:
            nonlocal calls
            calls += text == label
            if calls > 1:
                raise StopError

        with pytest.raises(StopError):
            calibrate(loaded, texts, "max-kl=0.02", settings=SETTINGS, state=state, progress=stop)
    assert without_times(calibrate(loaded, texts, "max-kl=0.02", settings=SETTINGS, state=state)) == whole
    # Everything is in the state now.
    steps: list[str] = []
    calibrate(
        loaded, texts, "max-kl=0.02", settings=SETTINGS, state=state, progress=lambda done, total, x: steps.append(x)
    )
    assert steps == []
    # Another target reads the sensitivities; another seed has its own.
    for target, seed, expected in (("max-kl=0.05", 0, False), ("max-kl=0.02", 1, True)):
        steps.clear()
        settings = replace(SETTINGS, seed=seed)
        again = calibrate(
            loaded, texts, target, settings=settings, state=state, progress=lambda done, total, x: steps.append(x)
        )
        assert ("sensitivities" in steps) == expected
        assert without_times(again) == without_times(calibrate(loaded, texts, target, settings=settings))
    with pytest.raises(InvalidInputError, match=r"^state file: expected one of the same model and dtype"):
        calibrate(replace(loaded, name="other"), texts, "max-kl=0.02", settings=SETTINGS, state=state)


def test_retrieval_is_part_of_the_report(loaded: LoadedModel, texts: list[Path]) -> None:
    settings = replace(SETTINGS, probes=0, needles=1536)
    result = calibrate(loaded, texts, "bits=5", settings=settings).result
    assert [x.name for x in result.retrieval] == ["16-bit", "calibrated bits=5", "turbo4", "turbo3", "turbo2"]
    assert any(x.measure == "share of secret codes lost" for x in result.breaks)


def test_sliding_windows_are_refused(texts: list[Path], loaded: LoadedModel) -> None:
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=200, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, sliding_window=32, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=16384,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    with pytest.raises(UnsupportedError, match="1 layers with a sliding window keep their own cache"):
        calibrate(replace(loaded, model=model), texts, settings=SETTINGS)
