"""Policies and page layouts of an engine, and what is refused; needs no vLLM."""

from dataclasses import replace
from pathlib import Path

import pytest

from turboattention.config import get_preset
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.integrations.vllm.settings import (
    DTYPES,
    check_model,
    layers_at_16_bits,
    page_layout,
    resolve_policy,
)
from turboattention.policy import ModelShape, Override, Policy

SHAPE = ModelShape("llama", 4, 8, 128)


@pytest.mark.parametrize(("dtype", "key", "value"), [("turbo_int4", 4, 4), ("turbo_k4v2", 4, 2), ("turbo_int2", 2, 2)])
def test_dtypes(dtype: str, key: int, value: int):
    cache = resolve_policy(dtype, {}).cache
    assert (cache.key.bits, cache.value.bits) == (key, value)
    assert dtype in DTYPES


def test_policy_of_the_configuration(tmp_path: Path):
    file = tmp_path / "policy.json"
    Policy.from_preset("int8").save(file)
    for named in ("int8", str(file)):
        assert resolve_policy("turbo_int4", {"turboattention": {"policy": named}}).name == "int8"


@pytest.mark.parametrize("section", [{"polcy": "turbo4"}, "turbo4"])
def test_unknown_configuration(section: object):
    with pytest.raises(InvalidInputError, match="additional-config"):
        resolve_policy("turbo_int4", {"turboattention": section})


def test_unknown_dtype():
    with pytest.raises(InvalidInputError, match="turbo_int4"):
        resolve_policy("auto", {})


@pytest.mark.parametrize("preset", ["paper4", "kivi4"])
def test_presets_that_pages_of_an_engine_cannot_hold(preset: str):
    with pytest.raises(UnsupportedError, match="turbo preset"):
        resolve_policy("turbo_int4", {"turboattention": {"policy": preset}})


def save(path: Path, *overrides: Override, model: ModelShape | None = None) -> dict[str, dict[str, str]]:
    Policy("mine", get_preset("turbo4").cache, overrides=overrides, model=model).save(path)
    return {"turboattention": {"policy": str(path)}}


@pytest.mark.parametrize(
    "override", [Override(8, layer=0), Override(16), Override(16, layer=0, head=1), Override(16, layer=1, tensor="key")]
)
def test_overrides_are_refused_but_for_whole_layers_at_16_bits(override: Override, tmp_path: Path):
    with pytest.raises(UnsupportedError, match="same format"):
        resolve_policy("turbo_int4", save(tmp_path / "policy.json", override))


def test_layers_at_16_bits_must_be_skipped_by_vllm(tmp_path: Path):
    policy = resolve_policy("turbo_int4", save(tmp_path / "policy.json", Override(16, layer=2), Override(16, layer=0)))
    assert layers_at_16_bits(policy) == (0, 2)
    check_model(policy, SHAPE, ["0", "2", "sliding_window"])
    with pytest.raises(InvalidInputError, match="kv-cache-dtype-skip-layers: expected 2 too"):
        check_model(policy, SHAPE, ["0"])


def test_a_policy_of_another_model(tmp_path: Path):
    policy = resolve_policy("turbo_int4", save(tmp_path / "policy.json", model=replace(SHAPE, layers=5)))
    with pytest.raises(InvalidInputError, match="calibrate"):
        check_model(policy, SHAPE, [])


@pytest.mark.parametrize(("preset", "head_dim"), [("turbo4", 128), ("turbo2", 64), ("int8", 256)])
def test_page_is_whole_bytes_a_token_with_the_sinks_inside(preset: str, head_dim: int):
    layout = page_layout(get_preset(preset).cache, head_dim)
    assert layout.nbytes % 64 == 0
    keys, values = layout.regions["sink_key"], layout.regions["sink_value"]
    assert keys.nbytes == values.nbytes == 2 * head_dim
    assert values.offset + values.nbytes <= layout.nbytes
    # No other region, and no padding that the kernels write, reaches into them.
    assert all(r.offset + r.nbytes <= keys.offset for name, r in layout.regions.items() if "sink" not in name)
    assert all(end <= keys.offset or start >= values.offset + values.nbytes for start, end in layout.gaps)


def test_presets_without_a_kernel():
    with pytest.raises(UnsupportedError, match="not 16"):
        page_layout(get_preset("fp16").cache, 128)


def test_bytes_that_the_documentation_states():
    text = (Path(__file__).parents[3] / "docs" / "vllm.md").read_text(encoding="utf-8")
    for dtype in DTYPES:
        nbytes = page_layout(resolve_policy(dtype, {}).cache, 128).nbytes
        assert f"| `{dtype}` | {nbytes / 64:.1f} | {4 * 128 * 64 / nbytes:.2f} |" in text
