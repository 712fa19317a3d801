"""Levels as formats, policies of choices, and bytes as the real cache counts them."""

from dataclasses import replace

import pytest
import torch

from turboattention.calibration.levels import (
    BASE,
    TENSORS,
    Unit,
    alone,
    cache_bits,
    levels,
    page_bytes,
    policy_of,
    uniform,
)
from turboattention.checks import SUPPORTED_HEAD_DIMS
from turboattention.config import presets
from turboattention.integrations.models import LoadedModel
from turboattention.integrations.transformers import TurboCache, enable, model_shape
from turboattention.policy import ModelShape, Policy
from turboattention.quant.layout import PageLayout

SHAPE = ModelShape("llama", 3, 2, 64)


def test_a_policy_gives_every_head_its_levels(tmp_path) -> None:  # type: ignore[no-untyped-def]
    choice = dict(uniform("3+1x20", "4", SHAPE))
    choice[1, 0] = ("2+2x26", "8")
    choice[2, 0], choice[2, 1] = ("8", "2"), ("8", "3")
    policy_of("mixed", choice, SHAPE).save(tmp_path / "policy.json")
    policy = Policy.load(tmp_path / "policy.json")
    for layer in range(3):
        for head, formats in enumerate(policy.head_formats(layer, 2)):
            key, value = choice[layer, head]
            assert formats == (levels("key", 64)[key], levels("value", 64)[value])


def test_one_unit_alone() -> None:
    policy = alone(Unit(1, 1, "key"), "2+2x18", SHAPE)
    found = {
        (layer, head, side): fmt
        for layer in range(3)
        for head, pair in enumerate(policy.head_formats(layer, 2))
        for side, fmt in zip(("key", "value"), pair, strict=True)
    }
    assert found.pop((1, 1, "key")) == levels("key", 64)["2+2x18"]
    assert all(fmt.bits == 16 for fmt in found.values())


def test_bytes_of_pages_are_those_of_the_layout() -> None:
    layout = PageLayout(64, 128, levels("key", 128)["3+1x34"], levels("value", 128)["2"])
    assert page_bytes(128)["3+1x34", "2"] == layout.nbytes


@pytest.mark.parametrize("name", ["turbo4", "turbo2", "kivi2", "fp16", "mixed", "one head"])
@pytest.mark.parametrize("tokens", [320, 350])
def test_bits_are_those_of_a_real_cache(name: str, tokens: int, loaded: LoadedModel) -> None:
    shape = model_shape(loaded.model.config)
    policies = {
        "mixed": policy_of("mixed", {**uniform("3", "4", shape), (0, 1): ("2+2x18", "2")}, shape),
        "one head": alone(Unit(1, 0, "value"), "4", shape),
    }
    policy = policies.get(name) or Policy.from_preset(name)
    with enable(loaded.model, policy), torch.inference_mode():
        cache = TurboCache(loaded.model.config, policy)
        for part in torch.arange(tokens).remainder(90)[None].split(64, dim=1):
            loaded.model(input_ids=part, past_key_values=cache)
        cache.commit()
    # A float32 model with nothing compressed keeps float32; reports count 2 bytes a value then.
    stored = [x for layer in cache.turbo_layers if layer.cache.compresses for x in [layer.cache]]
    expected = sum(x.nbytes for x in stored) + (len(cache.turbo_layers) - len(stored)) * 4 * 64 * 2 * tokens
    assert cache_bits(policy, shape, tokens) == pytest.approx(8 * expected / cache.num_values, rel=1e-12)


def test_levels_differ_from_the_base_in_widths_alone() -> None:
    for tensor in TENSORS:
        base = getattr(BASE, tensor)
        for fmt in levels(tensor, 64).values():
            plain = replace(fmt, bits=base.bits, search=base.search, refined_share=0.0, refined_bits=0)
            assert plain == replace(base, refined_share=0.0, refined_bits=0)
    assert presets()["turbo3"].cache.key == levels("key", 64)["3+1x6"]


@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_names_say_how_many_channels_are_refined(head_dim: int) -> None:
    """Also where share times head_dim is rounded; the first refined channels take room that a page has anyway."""
    found = levels("key", head_dim)
    assert len(found) == 4 + 3 * 5
    sizes = page_bytes(head_dim)
    for name, fmt in found.items():
        refined = fmt.refined_channels(head_dim)
        assert name == (f"{fmt.bits}+{fmt.refined_bits}x{refined}" if refined else str(fmt.bits))
    for bits in "234":
        free = next(x for x in found if x.startswith(f"{bits}+1"))
        assert all(sizes[bits, value] == sizes[free, value] for value in levels("value", head_dim))
