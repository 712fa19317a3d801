"""What we take hold of in other libraries, word by word: a release that changes it fails here first, with the name.

A failure means: read the release's change, adapt the integration, and then this file.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_llama

from turboattention.integrations.transformers import TurboCache, TurboLayer, enable

pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    eager_mask,
    flash_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

MODELS = (
    modeling_gemma2,
    modeling_gemma3,
    modeling_llama,
    modeling_mistral,
    modeling_phi3,
    modeling_qwen2,
    modeling_qwen3,
)


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (CacheLayerMixin.update, "key_states value_states args kwargs"),
        (CacheLayerMixin.lazy_initialization, "key_states value_states"),
        (CacheLayerMixin.get_mask_sizes, "query_length"),
        (CacheLayerMixin.get_seq_length, ""),
        (CacheLayerMixin.get_max_length, ""),
        (CacheLayerMixin.reset, ""),
        (CacheLayerMixin.reorder_cache, "beam_idx"),
        (CacheLayerMixin.offload, ""),
        (CacheLayerMixin.prefetch, ""),
        (DynamicLayer.crop, "tokens_to_remove"),
        (DynamicLayer.batch_repeat_interleave, "repeats"),
        (DynamicLayer.batch_select_indices, "indices"),
        (Cache.update, "key_states value_states layer_idx args kwargs"),
        (Cache.crop, "tokens_to_remove"),
        (Cache.reorder_cache, "beam_idx"),
        (Cache.batch_repeat_interleave, "repeats"),
        (Cache.batch_select_indices, "indices"),
        (Cache.get_mask_sizes, "query_length layer_idx"),
        (Cache.activate_past_recording, ""),
        (AttentionInterface.register, "key value"),
        (AttentionMaskInterface.register, "key value"),
        (causal_mask_function, "batch_idx head_idx q_idx kv_idx"),
        (PreTrainedModel._can_set_attn_implementation, ""),
        (PreTrainedModel.get_decoder, ""),
    ],
    ids=lambda x: getattr(x, "__qualname__", None),
)
def test_signatures(function: Callable[..., Any], expected: str) -> None:
    assert parameters(function) == expected.split()


def test_what_a_cache_layer_must_have() -> None:
    """A new abstract method would make our layer impossible; a new public one may have to be ours too."""
    assert CacheLayerMixin.__abstractmethods__ == {
        "update", "lazy_initialization", "get_mask_sizes", "get_seq_length", "get_max_length"
    }  # fmt: skip
    public = {name for name, x in vars(CacheLayerMixin).items() if callable(x) and not name.startswith("_")}
    public -= {"get_max_cache_shape"}  # of 5.17, gone since
    assert public - CacheLayerMixin.__abstractmethods__ == {"offload", "prefetch", "reset", "reorder_cache"}
    assert {"is_compileable", "is_croppable"} <= set(vars(CacheLayerMixin))
    for name in ("crop", "batch_repeat_interleave", "batch_select_indices"):
        assert name in vars(TurboLayer), name
    # `Cache` hands each of these to its layers.
    source = inspect.getsource(Cache)
    for name in ("crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "get_mask_sizes"):
        assert name in source


def test_arguments_that_we_pass() -> None:
    assert {"attn_implementation"} <= set(parameters(PreTrainedModel.set_attn_implementation))
    assert {"config"} <= set(parameters(DynamicCache.__init__))
    assert {"layers"} <= set(parameters(Cache.__init__))
    given = {"batch_size", "q_length", "kv_length", "q_offset", "mask_function", "attention_mask"}
    for function in (eager_mask, sdpa_mask, flash_attention_mask):
        assert given <= set(parameters(function)), function.__name__
        assert any(x.kind is x.VAR_KEYWORD for x in inspect.signature(function).parameters.values())
    for stock in ("eager", "sdpa"):
        assert stock in ALL_MASK_ATTENTION_FUNCTIONS
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS
    for function in (ALL_ATTENTION_FUNCTIONS["sdpa"], *(x.eager_attention_forward for x in MODELS)):
        assert parameters(function)[:5] == ["module", "query", "key", "value", "attention_mask"], function.__module__
        assert {"scaling", "dropout"} <= set(parameters(function)), function.__module__


def test_attributes_of_a_model_and_its_cache() -> None:
    model = tiny_llama(heads=4, kv_heads=2)
    assert model.config._attn_implementation in ("eager", "sdpa")
    assert model._can_set_attn_implementation()
    assert any(getattr(module, "is_causal", False) for module in model.modules())
    cache = DynamicCache(config=model.config)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * model.config.num_hidden_layers
    assert (cache.get_seq_length(), cache.offloading) == (0, False)
    assert issubclass(DynamicSlidingWindowLayer, DynamicLayer)
    layer = DynamicLayer()
    layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    assert (layer.is_initialized, layer.keys.shape, layer.values.shape) == (True, (1, 2, 3, 4), (1, 2, 3, 4))


def test_what_a_model_hands_over() -> None:
    """The attention function's own arguments, and the tensor that our cache returned, untouched in between."""
    seen: list[tuple[str, ...]] = []
    model = tiny_llama(heads=4, kv_heads=2).eval()
    with enable(model, "turbo4"), torch.inference_mode():
        name = model.config._attn_implementation
        ours = ALL_ATTENTION_FUNCTIONS[name]

        def spy(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
            assert isinstance(key._turbo_layer, TurboLayer)
            assert attention_mask is None
            seen.append(tuple(sorted(kwargs)))
            return ours(module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register(name, spy)
        try:
            out = model(torch.ones(1, 5, dtype=torch.long), use_cache=True)
        finally:
            AttentionInterface.register(name, ours)
    assert isinstance(out.past_key_values, TurboCache)
    assert len(seen) == model.config.num_hidden_layers
    assert all({"scaling", "dropout"} <= set(names) for names in seen)
