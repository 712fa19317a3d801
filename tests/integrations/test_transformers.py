"""The transformers bridge on tiny random models: fp16 equals the stock model, presets compress, the rest refused."""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

import turboattention as ta
from turboattention.config import AttentionConfig, presets
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.integrations.transformers import TurboLayer, model_shape
from turboattention.policy import ModelShape, Override, Policy
from turboattention.quant.error import relative_rms, sqnr_db

VOCABULARY = 200
WINDOW = 32
HYBRID = {
    "sliding_window": WINDOW,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {"hidden_size": 256}),
    "gemma2": ("Gemma2", HYBRID),
    "gemma3": ("Gemma3", {**HYBRID, "config": "Gemma3TextConfig"}),
}


STOCK = {"gemma2": "eager"}  # what transformers chooses because of the soft-cap; sdpa for all others


@pytest.fixture(autouse=True, scope="module")
def silence() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    yield
    transformers_logging.set_verbosity(before)


def build(name: str, **arguments: Any) -> PreTrainedModel:
    """A model of a transformers class pair, small and random, in float32."""
    config_name = arguments.pop("config", f"{name}Config")
    model_name = arguments.pop("model", f"{name}ForCausalLM")
    torch.manual_seed(0)
    return getattr(transformers, model_name)(getattr(transformers, config_name)(**arguments)).eval()


@lru_cache(maxsize=16)
def _tiny(family: str, changes: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    name, special = FAMILIES[family]
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,  # the usual 0.02 gives all tokens nearly equal probability
        "tie_word_embeddings": False,  # tied, a random Gemma repeats its input
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return build(name, **{**base, **special, **dict(changes)})


def tiny(family: str = "llama", **changes: Any) -> PreTrainedModel:
    return _tiny(family, tuple(changes.items()))


def prompts(batch: int = 2, tokens: int = 150, padding: int = 70) -> tuple[Tensor, Tensor]:
    """Random prompts; the second row is left-padded."""
    ids = torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if batch > 1:
        ids[1, :padding], mask[1, :padding] = 0, 0
    return ids, mask


def generate(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, tokens: int = 30, **options: Any
) -> Tensor:
    torch.manual_seed(3)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": tokens, **options}
    return model.generate(ids, attention_mask=mask, **options)


def restored(model: PreTrainedModel, implementation: str = "sdpa") -> bool:
    """Whether nothing of `enable` is left on a model."""
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    return hooks == 0 and model.config._attn_implementation == implementation


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    assert all(restored(tiny(family), STOCK.get(family, "sdpa")) for family in FAMILIES)


# --- fp16 equals the stock model ---

MODES: dict[str, tuple[dict[str, Any], bool]] = {
    "greedy": ({}, False),
    "left-padded": ({}, True),
    "sampling": ({"do_sample": True, "top_k": 20}, True),
    "beams": ({"num_beams": 3}, True),
    "prompt-lookup": ({"prompt_lookup_num_tokens": 5, "tokens": 50}, False),
    "chunked-prefill": ({"prefill_chunk_size": 40}, False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_generates_the_same_tokens(family: str, mode: str):
    model, (options, padded) = tiny(family), MODES[mode]
    ids, mask = prompts() if padded else prompts(batch=1)
    expected = generate(model, ids, mask, **options)
    with ta.enable(model, "fp16"):
        got = generate(model, ids, mask, **options)
    assert torch.equal(got, expected)
    assert len(set(expected[0, 150:].tolist())) > 3  # not one token repeated


@pytest.mark.parametrize(("family", "implementation"), [("llama", "eager"), ("gemma3", "eager")])
def test_fp16_with_the_other_stock_attention(family: str, implementation: str):
    model = tiny(family)
    ids, mask = prompts()
    model.set_attn_implementation(implementation)
    try:
        expected = generate(model, ids, mask)
        with ta.enable(model, "fp16"):
            assert torch.equal(generate(model, ids, mask), expected)
        assert restored(model, implementation)
    finally:
        model.set_attn_implementation(STOCK.get(family, "sdpa"))


OPTIONS: dict[str, dict[str, Any]] = {
    "several-returned-beams": {"num_beams": 3, "num_return_sequences": 2},
    "several-samples": {"do_sample": True, "num_return_sequences": 3},
    "guidance": {"guidance_scale": 1.5},
    "contrast-of-penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_fp16_with_other_options_of_generate(options: dict[str, Any]):
    model, (ids, mask) = tiny(), prompts()
    expected = generate(model, ids, mask, tokens=15, **options)
    with ta.enable(model, "fp16"):
        assert torch.equal(generate(model, ids, mask, tokens=15, **options), expected)


def test_fp16_with_a_draft_model():
    model, draft, (ids, _) = tiny(), tiny(num_hidden_layers=1), prompts(batch=1)
    expected = generate(model, ids, assistant_model=draft)
    with ta.enable(model, "fp16"):
        assert torch.equal(generate(model, ids, assistant_model=draft), expected)
        with ta.enable(draft, "fp16"):
            assert torch.equal(generate(model, ids, assistant_model=draft), expected)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(6, 2, 80), (7, 1, 96), (3, 3, 128), (4, 1, 256)], ids=lambda n: str(n)
)
def test_heads_and_head_dims(heads: int, kv_heads: int, head_dim: int):
    model = tiny(hidden_size=32 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    ids, mask = prompts()
    expected = generate(model, ids, mask, tokens=12)
    with ta.enable(model, "fp16"):
        assert torch.equal(generate(model, ids, mask, tokens=12), expected)
    exact = model(ids, attention_mask=mask).logits
    with ta.enable(model, "int8"), torch.no_grad():
        cache = ta.TurboCache(model.config, "int8")
        parts = [
            model(ids[:, i : i + 50], attention_mask=mask[:, : i + 50], past_key_values=cache).logits
            for i in range(0, 150, 50)
        ]
    assert cache.turbo_layers[0].cache.page_tokens == 64
    assert sqnr_db(torch.cat(parts, 1)[mask.bool()], exact[mask.bool()]) > 30.0


def test_logits_and_loss_of_one_forward():
    model, (ids, mask) = tiny(), prompts()
    expected = model(ids, attention_mask=mask, labels=ids)
    with ta.enable(model, "fp16"):
        got = model(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(got.logits[mask.bool()], expected.logits[mask.bool()], atol=1e-5, rtol=0)
    expected, labels = model(ids, labels=ids).loss, ids
    with ta.enable(model, "fp16"):
        torch.testing.assert_close(model(ids, labels=labels).loss, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left-padded"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("preset", ["fp16", "turbo4"])
def test_calls_without_a_cache_use_the_stock_attention(preset: str, implementation: str, padded: bool):
    """As `enable` says: nothing to compress, so the stock result, masks included."""
    model, (ids, mask) = tiny(), prompts()
    options = {"use_cache": False, "attention_mask": mask if padded else None}
    model.set_attn_implementation(implementation)
    try:
        expected = model(ids, **options).logits
        with ta.enable(model, preset):
            got = model(ids, **options).logits
    finally:
        model.set_attn_implementation("sdpa")
    seen = mask.bool() if padded else torch.ones_like(mask).bool()
    torch.testing.assert_close(got[seen], expected[seen], atol=1e-5, rtol=0)


def test_bfloat16_model():
    model = build("Llama", **{**tiny().config.to_diff_dict(), "dtype": None}).bfloat16()
    ids, mask = prompts()
    expected = generate(model, ids, mask)
    with ta.enable(model, "fp16"):
        assert torch.equal(generate(model, ids, mask), expected)
    with ta.enable(model, "turbo4"):
        out = generate(model, ids, mask, return_dict_in_generate=True)
    assert out.past_key_values.turbo_layers[0].cache.open.dtype == torch.bfloat16


# --- turbo4 compresses ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_turbo4_generates(family: str, mode: str):
    model, (options, padded) = tiny(family), MODES[mode]
    ids, mask = prompts() if padded else prompts(batch=1)
    with ta.enable(model, "turbo4"):
        out = generate(model, ids, mask, return_dict_in_generate=True, **options)
    cache = out.past_key_values
    assert isinstance(cache, ta.TurboCache)
    assert [layer.is_sliding for layer in cache.layers] == [
        kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    ]
    assert all(type(layer) in (TurboLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    for layer in cache.turbo_layers:
        assert layer.cache.page_tokens >= 128
        assert layer.cache.length == out.sequences.shape[1] - 1
    assert cache.bits_per_value < 32.0
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    assert torch.equal(out.sequences[:, :150], ids.repeat_interleave(out.sequences.shape[0] // ids.shape[0], 0))


@pytest.mark.parametrize("preset", list(presets()))
def test_every_preset_generates(preset: str):
    model, (ids, mask) = tiny(), prompts(tokens=250)
    with ta.enable(model, preset) as handle:
        assert handle.policy.name == preset
        out = generate(model, ids, mask, return_dict_in_generate=True)
    cache = out.past_key_values
    assert (cache.turbo_layers[0].cache.page_tokens > 0) == (preset != "fp16")
    assert out.sequences.shape == (2, 280)


def chunked_logits(model: PreTrainedModel, ids: Tensor, policy: str | Policy, size: int = 64) -> Tensor:
    cache = ta.TurboCache(model.config, policy)
    with ta.enable(model, policy), torch.no_grad():
        parts = [model(ids[:, i : i + size], past_key_values=cache).logits for i in range(0, ids.shape[1], size)]
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_through_the_cache(family: str):
    """More bits, closer to the stock model; the first page is exact in every preset."""
    model, (ids, _) = tiny(family), prompts(batch=1, tokens=320)
    with torch.no_grad():
        exact = model(ids).logits
    got = {preset: chunked_logits(model, ids, preset) for preset in ("fp16", "int8", "turbo4", "turbo2")}
    decibels = {preset: sqnr_db(logits[:, 64:], exact[:, 64:]) for preset, logits in got.items()}
    assert relative_rms(got["fp16"], exact) < 1e-5
    assert decibels["int8"] > decibels["turbo4"] + 10 > decibels["turbo2"] + 13
    assert decibels["int8"] > 30.0
    assert decibels["turbo4"] > 8.0
    assert sqnr_db(got["turbo4"][:, :64], exact[:, :64]) > 50.0


def test_policy_with_overrides():
    """Layer 0 at 8 bits and 2-bit values of one head elsewhere: the cache is built as the policy says."""
    overrides = (Override(8, layer=0), Override(2, layer=1, head=1, tensor="value"))
    policy = replace(
        Policy.from_preset("turbo4"), name="mine", overrides=overrides, model=ModelShape("llama", 2, 2, 64)
    )
    model, (ids, _) = tiny(), prompts(batch=1)
    with ta.enable(model, policy):
        cache = generate(model, ids, return_dict_in_generate=True).past_key_values
    bits = [
        {h: (g.layout.key.bits, g.layout.value.bits) for g in layer.cache.groups for h in g.heads}
        for layer in cache.turbo_layers
    ]
    assert bits == [{0: (8, 8), 1: (8, 8)}, {0: (4, 4), 1: (4, 2)}]


@pytest.mark.parametrize("preset", ["fp16", "int8", "kivi4"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_cache_without_enable_gives_the_same_tokens(family: str, preset: str):
    model, (ids, _) = tiny(family), prompts(batch=1, tokens=250)
    alone = generate(model, ids, past_key_values=ta.TurboCache(model.config, preset))
    with ta.enable(model, preset):
        enabled = generate(model, ids)
        passed = generate(model, ids, past_key_values=ta.TurboCache(model.config, preset))
    assert torch.equal(alone, enabled)
    assert torch.equal(passed, enabled)


@pytest.mark.parametrize("preset", ["turbo4", "turbo2"])
def test_cache_without_enable_sees_no_queries(preset: str):
    """Refined channels are then chosen by the range of K alone: other pages, of similar quality."""
    model, (ids, _) = tiny(), prompts(batch=1, tokens=320)
    cache = ta.TurboCache(model.config, preset)
    with torch.no_grad():
        exact = model(ids).logits
        alone = torch.cat([model(ids[:, i : i + 64], past_key_values=cache).logits for i in range(0, 320, 64)], 1)
    enabled = chunked_logits(model, ids, preset)
    assert cache.turbo_layers[0].cache.page_tokens == 256
    assert sqnr_db(alone, exact) == pytest.approx(sqnr_db(enabled, exact), abs=3.0)


def test_cache_without_enable_knows_padding():
    """fp16 keeps every token, so a left-padded batch equals the stock model without `enable` too."""
    model, (ids, mask) = tiny(), prompts()
    cache = ta.TurboCache(model.config, "fp16")
    assert torch.equal(generate(model, ids, mask, past_key_values=cache), generate(model, ids, mask))


def test_assisted_generation_keeps_greedy_tokens_in_int8():
    model = tiny()
    ids = prompts(batch=1, tokens=40)[0].repeat(1, 4)
    with ta.enable(model, "int8"):
        assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=6), generate(model, ids))


def test_sizes_of_a_hybrid_model():
    """Full layers as turbo4, sliding ones as transformers keeps them; `commit` compresses what is full."""
    model, (ids, _) = tiny("gemma2"), prompts(batch=1, tokens=192)
    cache = ta.TurboCache(model.config, "turbo4")
    with pytest.raises(InvalidInputError, match=r"^cache: expected tokens to measure, received an empty cache$"):
        _ = cache.bits_per_value
    with ta.enable(model, "turbo4"):
        model(ids, past_key_values=cache)
    assert cache.turbo_layers[0].cache.page_tokens == 128
    cache.commit()
    layer = cache.turbo_layers[0].cache
    assert layer.page_tokens == layer.length == 192
    stock = [cache.layers[0], cache.layers[2]]
    assert all(x.keys.shape[2] == WINDOW - 1 for x in stock)
    assert cache.nbytes == layer.nbytes + 2 * sum(x.keys.nbytes for x in stock)
    assert cache.num_values == 2 * (2 * 64 * 192 + 2 * 2 * 64 * (WINDOW - 1))
    assert cache.bits_per_value == pytest.approx(cache.nbytes * 8 / cache.num_values)


# --- the transformers API of a cache ---


def test_state_continues_identically():
    for family in ("llama", "gemma2"):
        model, (ids, mask) = tiny(family), prompts()
        cache = ta.TurboCache(model.config, "turbo4")
        with ta.enable(model, "turbo4"), torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            file = io.BytesIO()
            torch.save(cache.state(), file)
            file.seek(0)
            other = ta.TurboCache(model.config, "turbo4")
            other.load_state(torch.load(file, weights_only=True))
            assert (other.nbytes, other.get_seq_length()) == (cache.nbytes, 150)
            longer = torch.cat([ids, ids[:, -1:]], 1)
            longer_mask = torch.cat([mask, mask[:, -1:]], 1)
            a, b = (generate(model, longer, longer_mask, past_key_values=x) for x in (cache, other))
        assert torch.equal(a, b), family
        assert cache.nbytes == other.nbytes


def test_state_of_another_policy_is_refused():
    model = tiny()
    state = ta.TurboCache(model.config, "turbo4").state()
    with pytest.raises(InvalidInputError, match=r"^state: expected policy 'turbo3' and 2 layers, received turbo4"):
        ta.TurboCache(model.config, "turbo3").load_state(state)
    with pytest.raises(InvalidInputError, match=r"^state: expected policy 'turbo4' and 1 layers"):
        ta.TurboCache(tiny(num_hidden_layers=1).config, "turbo4").load_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["turbo"][1].update(page_count=9), r"^state.groups\[0\].pages: expected"),
        (lambda state: state["stock"][0].update(keys="text"), "^state.stock.keys: expected a value of type Tensor"),
        (lambda state: state["stock"][0].update(update=None), "^state.stock: expected the names keys, values"),
        (lambda state: state.pop("stock"), "^state: expected policy, turbo and stock"),
        (lambda state: state.update(turbo=[]), "^state: expected policy 'turbo4' and 3 layers"),
    ],
)
def test_a_damaged_state_leaves_every_layer_as_it_was(change: Callable[[dict], object], message: str):
    """Gemma 2: layers of transformers' own around one of ours."""
    model, (ids, mask) = tiny("gemma2"), prompts()
    cache = ta.TurboCache(model.config, "turbo4")
    with ta.enable(model, "turbo4"), torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    state = cache.state()
    change(state)
    other = ta.TurboCache(model.config, "turbo4")
    with pytest.raises(InvalidInputError, match=message):
        other.load_state(state)
    assert other.get_seq_length() == 0
    assert other.nbytes == 0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "crop": lambda cache: cache.crop(-7),
    "crop-nothing": lambda cache: cache.crop(0),
}
ROWS = {"reorder": [1, 1], "repeat": [0, 0, 1, 1], "select": [1]}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_changes_of_a_cache_equal_those_of_the_stock_cache(family: str, change: str):
    """fp16 against transformers' DynamicCache after the same change."""
    model, (ids, mask) = tiny(family), prompts()
    logits = []
    for cache in (DynamicCache(config=model.config), ta.TurboCache(model.config, "fp16")):
        cache.activate_past_recording()
        handle = ta.enable(model, "fp16") if isinstance(cache, ta.TurboCache) else None
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            model(ids[:, :20], attention_mask=torch.cat([mask, mask[:, -20:]], 1), past_key_values=cache)
            CHANGES[change](cache)
            rows, length = ROWS.get(change, [0, 1]), cache.get_seq_length()
            seen = torch.cat([mask, torch.ones(2, length - 150 + 5, dtype=mask.dtype)], 1)[rows]
            logits.append(model(ids[rows, 20:25] + 1, attention_mask=seen, past_key_values=cache).logits)
        if handle is not None:
            handle.disable()
    assert length == (163 if change == "crop" else 170)
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("change", ["reorder", "repeat", "select"])
def test_changes_of_compressed_rows(change: str):
    """Rows do not know each other: after any change a row of turbo4 continues as it would alone."""
    model, ids = tiny(), prompts()[0].clamp_min(2)
    caches = [ta.TurboCache(model.config, "turbo4") for _ in range(3)]
    with ta.enable(model, "turbo4"), torch.no_grad():
        model(ids, past_key_values=caches[2])
        alone = []
        for row in (0, 1):
            model(ids[row : row + 1], past_key_values=caches[row])
            alone.append(model(ids[row : row + 1, :3] // 2 + 2, past_key_values=caches[row]).logits)
        CHANGES[change](caches[2])
        rows = ROWS[change]
        got = model(ids[rows, :3] // 2 + 2, past_key_values=caches[2]).logits
    # The C++ kernels cut a row into other parts in another batch, and round the weights of each part to 16 bits:
    # attention is up to 2.9e-4 off the definition, these logits up to 2.7e-4 apart. The two rows differ by over 0.5.
    assert (alone[0] - alone[1]).abs().amax(-1).min() > 0.5
    torch.testing.assert_close(got, torch.cat([alone[row] for row in rows]), atol=5e-4, rtol=0)


def test_crop_of_the_latest_tokens_in_turbo4():
    model, (ids, _) = tiny(), prompts(batch=1, tokens=200)
    a, b = (ta.TurboCache(model.config, "turbo4") for _ in range(2))
    with ta.enable(model, "turbo4"), torch.no_grad():
        for cache in (a, b):
            model(ids[:, :150], past_key_values=cache)
        model(ids[:, 150:190], past_key_values=a)
        a.crop(-40)
        got, expected = (model(ids[:, 190:], past_key_values=x).logits for x in (a, b))
    assert torch.equal(got, expected)
    assert a.get_seq_length() == b.get_seq_length() == 160


def test_crop_into_a_page_is_refused():
    model, (ids, _) = tiny(), prompts(batch=1)
    cache = ta.TurboCache(model.config, "turbo4")
    with ta.enable(model, "turbo4"):
        model(ids, past_key_values=cache)
    cache.commit()
    with pytest.raises(InvalidInputError, match=r"^crop: expected at least 128 tokens .* received 100"):
        cache.crop(-50)
    assert cache.get_seq_length() == 150
    with pytest.raises(InvalidInputError, match=r"^tokens_to_remove: expected 0 or a negative number of tokens"):
        cache.crop(100)
    cache.crop(-22)
    assert cache.get_seq_length() == 128


def test_refused_crop_of_a_hybrid_model_changes_no_layer():
    """Otherwise the sliding layers are shorter than the full ones, and everything after is wrong in silence."""
    model, (ids, _) = tiny("gemma2"), prompts(batch=1)
    cache = ta.TurboCache(model.config, "turbo4")
    cache.activate_past_recording()
    with ta.enable(model, "turbo4"):
        model(ids, past_key_values=cache)
    cache.commit()
    with pytest.raises(InvalidInputError, match=r"^crop: expected at least 128 tokens"):
        cache.crop(-50)
    assert [layer.get_seq_length() for layer in cache.layers] == [150, 150, 150]


def test_reset_cache_serves_again():
    model, (ids, _) = tiny(), prompts(batch=1)
    cache = ta.TurboCache(model.config, "turbo4")
    with ta.enable(model, "turbo4"), torch.no_grad():
        first = model(ids, past_key_values=cache).logits
        cache.reset()
        assert (cache.get_seq_length(), cache.nbytes, cache.num_values) == (0, 0, 0)
        assert torch.equal(model(ids, past_key_values=cache).logits, first)


# --- a chunk in INT8 ---


def in_int8(preset: str = "turbo4") -> Policy:
    return replace(Policy.from_preset(preset), attention=AttentionConfig(chunk_bits=8))


@pytest.mark.parametrize("chunk", [150, 64, 80], ids=["at-once", "chunks-of-64", "chunks-of-80-and-70"])
@pytest.mark.parametrize("padding", [0, 70])
@pytest.mark.parametrize("preset", ["turbo4", "fp16"])
def test_logits_with_a_chunk_in_int8(preset: str, padding: int, chunk: int):
    """Near those of 16 bits (measured 29.9 dB and more), and different from them: the switch is on."""
    model, (ids, mask) = tiny(), prompts(padding=padding)
    results = []
    for policy in (Policy.from_preset(preset), in_int8(preset)):
        cache = ta.TurboCache(model.config, policy)
        with ta.enable(model, policy), torch.no_grad():
            parts = [
                model(ids[:, i : i + chunk], attention_mask=mask[:, : i + chunk], past_key_values=cache).logits
                for i in range(0, 150, chunk)
            ]
        results.append(torch.cat(parts, 1)[mask.bool()])
    assert not torch.equal(*results)
    assert sqnr_db(results[1], results[0]) > 28.0


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 70}, {"num_beams": 2}], ids=["plain", "chunked", "beams"]
)
def test_generate_with_a_chunk_in_int8(options: dict[str, Any]):
    model, (ids, mask) = tiny(), prompts()
    with ta.enable(model, in_int8()):
        out = generate(model, ids, mask, tokens=12, return_dict_in_generate=True, output_logits=True, **options)
    assert out.sequences.shape == (2, 162)
    assert all(torch.isfinite(x).all() for x in out.logits)
    with ta.enable(model, "turbo4"):
        want = generate(model, ids, mask, tokens=12, return_dict_in_generate=True, output_logits=True, **options)
    assert sqnr_db(out.logits[0], want.logits[0]) > 27.0  # the definition 30 dB; kernels round P to 8 bits too
    assert restored(model)


def test_what_a_chunk_in_int8_does_not_fit():
    with pytest.raises(UnsupportedError, match=r"^Gemma2ForCausalLM: chunk_bits 8 has no form for soft-capped scores"):
        ta.enable(tiny("gemma2"), in_int8())
    with pytest.raises(UnsupportedError, match=r"^policy 'fp16': chunk_bits 8 needs a head_dim"):
        ta.enable(tiny(head_dim=32), in_int8("fp16"))
    model, (ids, _) = tiny(), prompts(batch=1)
    with ta.enable(model, in_int8()), pytest.raises(UnsupportedError, match=r"no gradient; call under torch.inference"):
        model(ids)


# --- enable and disable ---


def test_call_and_handle():
    model = tiny()
    handle = ta.enable(model, "turbo4")
    assert model.config._attn_implementation != "sdpa"
    handle.disable()
    assert restored(model)
    handle.disable()
    assert restored(model)


def test_exception_restores_the_model():
    model, (ids, _) = tiny(), prompts(batch=1)
    expected = generate(model, ids)
    with pytest.raises(ZeroDivisionError), ta.enable(model, "turbo2"):
        _ = 1 / 0
    assert restored(model)
    broken = prompts()[1].flip(1)
    with pytest.raises(UnsupportedError), ta.enable(model, "turbo2"):
        model(prompts()[0], attention_mask=broken)
    assert restored(model)
    assert torch.equal(generate(model, ids), expected)


def test_enable_twice_is_refused():
    model = tiny()
    with ta.enable(model, "turbo4"):
        with pytest.raises(
            UnsupportedError, match=r"^LlamaForCausalLM: TurboAttention is already enabled; call disable"
        ):
            ta.enable(model, "turbo4")
        with pytest.raises(UnsupportedError, match=r"^LlamaModel: TurboAttention is already enabled"):
            ta.enable(model.model, "turbo4")
    assert restored(model)


def test_two_models_with_two_policies():
    a, b, (ids, _) = tiny("llama"), tiny("qwen2"), prompts(batch=1)
    with ta.enable(a, "turbo4"), ta.enable(b, "int8"):
        names = [generate(m, ids, return_dict_in_generate=True).past_key_values.policy.name for m in (a, b)]
    assert names == ["turbo4", "int8"]


def test_model_without_a_head():
    model, (ids, _) = tiny(), prompts(batch=1)
    expected = model.model(ids).last_hidden_state
    with ta.enable(model.model, "fp16"):
        out = model.model(ids)
    assert isinstance(out.past_key_values, ta.TurboCache)
    torch.testing.assert_close(out.last_hidden_state, expected, atol=1e-5, rtol=0)


def test_default_policy_is_turbo4():
    model = tiny()
    with ta.enable(model) as handle:
        assert handle.policy == Policy.from_preset("turbo4")
    assert ta.TurboCache(model.config).policy == Policy.from_preset("turbo4")


# --- what is refused, and why ---

SMALL = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 32}
ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "encoder-decoder": (
        "T5",
        {"model": "T5ForConditionalGeneration", "d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16},
        "T5ForConditionalGeneration: encoder-decoder models are not supported",
    ),
    "encoder": (
        "Bert",
        {"model": "BertModel", **SMALL, "num_hidden_layers": 1, "num_attention_heads": 1},
        "BertModel: ",
    ),
    "learned-sinks": (
        "GptOss",
        {**SMALL, **ONE_HEAD, "num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 1},
        "GptOssForCausalLM: learned attention sinks are not supported",
    ),
    "sliding-alone": (
        "Mistral",
        {**SMALL, **ONE_HEAD, "num_hidden_layers": 1, "sliding_window": 16},
        "mistral: every layer has a sliding window; there is no full attention to compress",
    ),
    "latent-attention": (
        "DeepseekV3",
        {
            **SMALL,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        "deepseek_v3: multi-head latent attention stores no K and V per head",
    ),
    "linear-attention": (
        "Qwen3Next",
        {
            **SMALL,
            **ONE_HEAD,
            "num_hidden_layers": 4,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "qwen3_next: layer 0 has a cache of kind LinearAttentionLayer",
    ),
    "shared-layers": (
        "Gemma3n",
        {
            "config": "Gemma3nTextConfig",
            **SMALL,
            **ONE_HEAD,
            "vocab_size_per_layer_input": 50,
            "num_hidden_layers": 4,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "layer_types": ["full_attention"] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        "gemma3n_text: layers that share the cache of other layers are not supported",
    ),
    "alibi": (
        "Falcon",
        {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "alibi": True},
        "FalconForCausalLM: ALiBi position biases are not supported",
    ),
    "own-attention": (
        "Bloom",
        {"vocab_size": 50, "hidden_size": 64, "n_layer": 1, "n_head": 1},
        "BloomForCausalLM: does not use transformers' attention interface",
    ),
    "no-attention": (
        "Mamba",
        {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 1},
        "MambaForCausalLM: ",
    ),
}


@pytest.mark.parametrize(("name", "arguments", "message"), MODELS.values(), ids=MODELS.keys())
def test_models_that_are_refused(name: str, arguments: dict[str, Any], message: str):
    model = build(name, **arguments)
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedError) as error:
        ta.enable(model, "turbo4").disable()
    assert str(error.value).startswith(message)
    assert restored(model, implementation)


def test_other_attention_implementations_are_refused():
    model = build("Llama", **tiny().config.to_diff_dict())
    model.set_attn_implementation("flex_attention")
    with pytest.raises(
        UnsupportedError, match=r"^LlamaForCausalLM: attention implementation 'flex_attention' can't serve"
    ):
        ta.enable(model)


@pytest.mark.parametrize("thing", [3, "llama", nn.Linear(2, 2), None], ids=["int", "name", "module", "none"])
def test_things_that_are_no_model(thing: object):
    with pytest.raises(InvalidInputError, match=r"^model: expected a transformers PreTrainedModel, received "):
        ta.enable(thing)


def test_head_dim_that_no_page_holds():
    model = tiny(head_dim=32)
    with pytest.raises(InvalidInputError, match=r"^head_dim: expected one of .*received 32; use preset 'fp16'"):
        ta.enable(model, "turbo4")
    assert restored(model)
    ids, mask = prompts()
    expected = generate(model, ids, mask, tokens=8)
    with ta.enable(model, "fp16"):
        assert torch.equal(generate(model, ids, mask, tokens=8), expected)


def test_kivi_groups_that_do_not_divide():
    with pytest.raises(UnsupportedError, match=r"^policy 'kivi4': groups of 32 channels .*head_dim 80$"):
        ta.enable(tiny(head_dim=80), "kivi4")


def test_policies_of_another_model():
    model = tiny()
    assert model_shape(model.config) == ModelShape("llama", 2, 2, 64)
    other = replace(Policy.from_preset("turbo4"), model=ModelShape("qwen2", 24, 2, 64))
    far = replace(Policy.from_preset("turbo4"), overrides=(Override(8, layer=2),))
    with pytest.raises(InvalidInputError, match=r"^policy: expected a model like .*qwen2.*calibrate a policy for this"):
        ta.enable(model, other)
    with pytest.raises(InvalidInputError, match=r"^override layer: expected below 2, received 2$"):
        ta.TurboCache(model.config, far)
    with pytest.raises(InvalidInputError, match=r"^preset: expected one of fp16, int8, turbo4"):
        ta.enable(model, "turbo9")
    assert restored(model)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(2, 1, 150, 150, dtype=torch.bool),
            r"^attention_mask: expected \[batch, 150\] with left padding, rec",
        ),
        (
            prompts()[1].flip(1),
            r"^attention_mask: expected padding on the left only; set tokenizer.padding_side = 'left'$",
        ),
        (torch.cat([prompts()[1][:, 75:], prompts()[1][:, :75]], 1), "padding on the left only"),
    ],
    ids=["4-dimensional", "right-padded", "hole"],
)
def test_masks_that_are_refused(mask: Tensor, message: str):
    model = tiny()
    with ta.enable(model, "turbo4"), pytest.raises(UnsupportedError, match=message):
        model(prompts()[0], attention_mask=mask)


def test_caches_that_are_refused():
    model, (ids, _) = tiny(), prompts(batch=1)
    message = r"^past_key_values: expected a TurboCache, received {}; pass TurboCache\(model.config, policy\) or leave"
    static, filled = StaticCache(config=model.config, max_cache_len=300), DynamicCache(config=model.config)
    model(ids, past_key_values=filled)
    with ta.enable(model, "turbo4"):
        for call in (model, lambda ids, past_key_values: generate(model, ids, past_key_values=past_key_values)):
            with pytest.raises(UnsupportedError, match=message.format("StaticCache")):
                call(ids, past_key_values=static)
            with pytest.raises(UnsupportedError, match=message.format("DynamicCache")):
                call(ids, past_key_values=filled)
        cache = DynamicCache(config=model.config)
        generate(model, ids, past_key_values=cache)
        assert all(isinstance(layer, TurboLayer) and layer.cache.page_tokens for layer in cache.layers)


def test_empty_dynamic_cache_of_the_user_is_never_left_empty():
    """Refused, or used: a caller who passes it again must not lose the first tokens in silence."""
    model, (ids, _) = tiny(), prompts(batch=1)
    with torch.no_grad():
        expected = model(ids).logits[:, 100:]
        cache = DynamicCache(config=model.config)
        try:
            with ta.enable(model, "fp16"):
                model(ids[:, :100], past_key_values=cache)
                got = model(ids[:, 100:], past_key_values=cache).logits
        except UnsupportedError:
            return
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["static", "offloaded", "offloaded_static"])
def test_cache_implementations_of_generate_that_are_refused(implementation: str):
    model, (ids, _) = tiny(), prompts(batch=1)
    with ta.enable(model, "turbo4"), pytest.raises(UnsupportedError, match=r"TurboCache"):
        generate(model, ids, tokens=3, cache_implementation=implementation)


def test_offload_of_a_layer_is_refused():
    with pytest.raises(UnsupportedError, match=r"^offload: TurboCache layers stay on the device of the model$"):
        ta.TurboCache(tiny().config).layers[0].offload()


def test_cache_of_another_model_is_refused():
    model, (ids, _) = tiny(), prompts(batch=1)
    with ta.enable(model, "turbo4"):
        for other in (tiny(num_hidden_layers=1), tiny(num_key_value_heads=1), tiny(head_dim=128)):
            with pytest.raises(InvalidInputError, match="expected"):
                model(ids, past_key_values=ta.TurboCache(other.config, "turbo4"))


def test_dropout_is_refused():
    model = build("Llama", **{**tiny().config.to_diff_dict(), "attention_dropout": 0.5}).train()
    with (
        ta.enable(model, "turbo4"),
        pytest.raises(UnsupportedError, match=r"^dropout: expected 0 .*call model.eval\(\)"),
    ):
        model(prompts()[0])


def test_not_a_number_in_the_weights_is_found():
    model = build("Llama", **tiny().config.to_diff_dict())
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 5] = torch.nan
    with (
        ta.enable(model, "turbo4"),
        pytest.raises(InvalidInputError, match=r"^value: expected finite values, .*check the model's weights"),
    ):
        model(prompts()[0])
    assert restored(model)
