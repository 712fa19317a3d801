"""Layers that keep vLLM's 16-bit cache: those of a skip list go to a backend of vLLM, inside one backend of ours.

vLLM asks one backend class for every layer of a kind and tells the layer's KV dtype only to what it makes of it. So the
two classes below are chosen when they are made: ours where the cache is ours, else those of vLLM's own backend.
"""

from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any

PLAIN_DTYPES = ("auto", "float16", "bfloat16")  # KV dtypes of 16-bit pages


def is_ours(kv_cache_spec: Any) -> bool:
    """Whether a layer's pages are in our layout: `customize_spec` has set their size."""
    return getattr(kv_cache_spec, "state_content_bytes", None) is not None


@cache
def impl_class(ours: Any, plain: Callable[[], Any]) -> Any:
    """A class that makes ``ours`` for layers with a KV dtype of ours, else the implementation of a backend of vLLM.

    plain: gives that backend's class. What is made of it stores K and V itself, because vLLM does that before attention
    only for backends that say so, and ours does not.
    """

    class Layer(ours):  # type: ignore[misc]  # a class that is an argument
        def __new__(cls, *args: Any, **named: Any) -> Any:
            dtype = named["kv_cache_dtype"] if "kv_cache_dtype" in named else args[6]
            if dtype not in PLAIN_DTYPES:
                return super().__new__(cls, *args, **named)
            return _storing(plain().get_impl_cls())(*args, **named)

    return Layer


@cache
def _storing(impl: Any) -> Any:
    class Delegated(impl):  # type: ignore[misc]  # as above
        delegated = True

        def forward(
            self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, *rest: Any,
            **named: Any,
        ) -> Any:  # fmt: skip
            if attn_metadata is not None and self.kv_sharing_target_layer_name is None:
                self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, *rest, **named)

    return Delegated


@cache
def builder_class(ours: Any, plain: Callable[[], Any]) -> Any:
    """The same for the metadata of a group of layers with one kind of pages."""

    class Builder(ours):  # type: ignore[misc]  # as above
        def __new__(cls, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any, **named: Any) -> Any:
            if is_ours(kv_cache_spec):
                return super().__new__(cls)
            return plain().get_builder_cls()(kv_cache_spec, layer_names, _plain_config(vllm_config), device, **named)

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            if is_ours(kv_cache_spec):
                return super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return plain().get_builder_cls().get_cudagraph_support(_plain_config(vllm_config), kv_cache_spec)

    return Builder


def _plain_config(vllm_config: Any) -> Any:
    """The configuration with 16-bit pages: vLLM's backends take the cache's dtype from there, not from the layer."""
    config = copy(vllm_config)
    config.cache_config = copy(vllm_config.cache_config)
    config.cache_config.cache_dtype = "auto"
    return config
