"""From vLLM's layers to the report of the start."""

from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from turboattention.integrations.vllm.impl import TurboAttentionImpl
from turboattention.integrations.vllm.report import LayerCache, StartReport


def compressed_layers(vllm_config: Any, names: list[str] | None = None) -> dict[str, TurboAttentionImpl]:
    """The layers of this process (or of a group) whose pages are ours, by name."""
    layers = get_layers_from_vllm_config(vllm_config, Attention, names)
    return {name: layer.impl for name, layer in layers.items() if isinstance(layer.impl, TurboAttentionImpl)}


def start_report(vllm_config: Any) -> StartReport:
    """The report of this process; the layers must have their cache."""
    every = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    layers, memory = [], {}
    policy, rows = "", 0
    for name, layer in every.items():
        if not isinstance(layer, Attention) or layer.kv_sharing_target_layer_name is not None:
            continue
        cache = layer.kv_cache
        memory[cache.untyped_storage().data_ptr()] = cache.untyped_storage().nbytes()
        plain = 2 * layer.num_kv_heads * (layer.head_size + layer.head_size_v)
        ours = isinstance(layer.impl, TurboAttentionImpl)
        # Blocks, KV heads, tokens, bytes or numbers of a token.
        token = cache[0].numel() * cache.element_size() / cache.shape[2]
        if ours:
            policy, rows = layer.impl.policy.name, layer.impl.pages.key.shape[0]
        layers.append(
            LayerCache(name, _reason(layer), token, plain, layer.impl.pages.nbytes if ours else 0)
        )  # fmt: skip
    other = sum(not isinstance(layer, Attention) for layer in every.values())
    return StartReport(policy, tuple(layers), sum(memory.values()), rows, other)


def _reason(layer: Any) -> str | None:
    if isinstance(layer.impl, TurboAttentionImpl):
        return None
    if layer.sliding_window is not None:
        return f"sliding window of {layer.sliding_window} tokens"
    return "kv-cache-dtype-skip-layers"
