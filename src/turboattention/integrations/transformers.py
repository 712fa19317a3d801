"""transformers: a cache whose layers are compressed pages, and the attention that reads them.

``enable(model)`` uses public extension points alone: the attention and mask registries, ``set_attn_implementation`` and
a forward hook that hands the model a cache. Everything is undone by ``disable`` or at the end of the ``with`` block.
"""

import copy
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

try:
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError as error:
    from turboattention.errors import MissingDependencyError

    raise MissingDependencyError(
        f"transformers: expected version 5.17 to 5.23, received {error}; run pip install 'turboattention[transformers]'"
    ) from error

from turboattention.errors import UnsupportedError, invalid
from turboattention.integrations.observer import CacheObserver, LayerObserver
from turboattention.kvcache import LayerCache
from turboattention.kvcache.saved_state import SavedState
from turboattention.ops import attend
from turboattention.ops.prefill.reference import expand_cache
from turboattention.policy import ModelShape, Policy

PREFIX = "turboattention_"
# Stock implementations whose attention can serve the layers that are not ours.
_STOCK = ("eager", "sdpa")


def model_shape(config: PreTrainedConfig) -> ModelShape:
    """Layers, KV heads and head_dim of a model's (text) configuration."""
    text = config.get_text_config(decoder=True)
    if not getattr(text, "num_attention_heads", None):
        raise UnsupportedError(f"{text.model_type}: a model without attention heads has no cache to compress")
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(text.model_type, text.num_hidden_layers, kv_heads, head_dim)


class TurboLayer(CacheLayerMixin):
    """One full-attention layer of a TurboCache."""

    is_sliding = False
    is_croppable = False

    def __init__(self, cache: LayerCache, attention: Policy, config: PreTrainedConfig) -> None:
        super().__init__()
        self.cache, self.policy, self._config = cache, attention, config
        self.observer: LayerObserver | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append. Returns the new K, marked for `attend_layer`; under a stock attention all tokens, dequantised."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cache.append(key_states, value_states)
        if self.observer is not None:
            self.observer.appended(key_states, value_states)
        if str(self._config._attn_implementation).startswith(PREFIX):
            key_states._turbo_layer = self  # type: ignore[attr-defined]  # the hand-over from cache to attention
            return key_states, value_states
        key, value = expand_cache(self.cache.view(), key_states.dtype)
        self.cache.settle()
        return key, value

    def __deepcopy__(self, memo: dict[int, Any]) -> "TurboLayer":
        # The model's configuration says which attention reads the copy, so it must stay the model's own.
        copied = TurboLayer(copy.deepcopy(self.cache, memo), self.policy, self._config)
        copied.is_initialized = self.is_initialized
        return copied

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._rearrange()
        self.cache.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens; refused when a compressed page would be cut in two."""
        if tokens_to_remove > 0:
            raise invalid("tokens_to_remove", "0 or a negative number of tokens", tokens_to_remove)
        self.cache.crop(max(0, self.cache.length + tokens_to_remove))
        if self.observer is not None:
            self.observer.cropped(self.cache.length)

    def _rearrange(self) -> None:
        if self.observer is not None:
            self.observer.rearranged()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rearrange()
        self.cache.map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rearrange()
        self.cache.map_batch(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rearrange()
        self.cache.map_batch(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        raise UnsupportedError("offload: TurboCache layers stay on the device of the model")


class TurboCache(Cache):
    """A transformers cache with compressed full-attention layers; sliding-window layers stay transformers' own.

    Pass it as ``past_key_values`` inside ``enable(model)``. Under a stock attention it also works, by dequantising all
    tokens at every step: slower, no smaller while it computes, and a little less exact, because the cache sees neither
    the queries (which choose the refined channels) nor the padding of a batch.
    """

    def __init__(self, config: PreTrainedConfig, policy: str | Policy = "turbo4") -> None:
        """config: the model's; policy: a preset's name or a Policy. Raises UnsupportedError for what it can't hold."""
        self.policy = Policy.resolve(policy)
        text = config.get_text_config(decoder=True)
        shape = self.shape = model_shape(config)
        layers_of_model = stock_layers(text)
        self.policy.validate_for(shape)
        layers: list[CacheLayerMixin] = []
        for index, stock in enumerate(layers_of_model):
            if type(stock) is DynamicLayer:
                formats = self.policy.head_formats(index, shape.kv_heads)
                stock = TurboLayer(LayerCache(self.policy.cache, formats), self.policy, text)
            layers.append(stock)
        super().__init__(layers=list(layers))

    @property
    def turbo_layers(self) -> list[TurboLayer]:
        """The compressed layers."""
        return [layer for layer in self.layers if isinstance(layer, TurboLayer)]

    def commit(self) -> None:
        """All tokens so far are final: compress every full page now instead of at the next step."""
        for layer in self.turbo_layers:
            layer.cache.commit()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens of every layer, or of none when one refuses."""
        for turbo in self.turbo_layers:
            turbo.cache.check_crop(max(0, turbo.cache.length + min(0, tokens_to_remove)))
        # transformers' own layers may refuse too, and do so before they change.
        stock_first: list[Any] = sorted(self.layers, key=lambda layer: isinstance(layer, TurboLayer))
        for layer in stock_first:
            layer.crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Every byte held by all layers, sliding-window layers included."""
        return sum(layer.cache.nbytes for layer in self.turbo_layers) + sum(x.nbytes for x in self._stock_tensors())

    @property
    def num_values(self) -> int:
        """Values of K and V that all layers stand for."""
        stock = sum(x.numel() for x in self._stock_tensors())
        return sum(layer.cache.num_values for layer in self.turbo_layers) + stock

    @property
    def bits_per_value(self) -> float:
        """``nbytes * 8 / num_values``; raises InvalidInputError while empty."""
        if not self.num_values:
            raise invalid("cache", "tokens to measure", "an empty cache")
        return self.nbytes * 8 / self.num_values

    def state(self) -> dict[str, Any]:
        """Everything needed to go on in another TurboCache of the same model and policy."""
        stock = [
            None if isinstance(x, TurboLayer) else {k: v for k, v in vars(x).items() if not k.startswith("_")}
            for x in self.layers
        ]
        turbo = [x.cache.state() if isinstance(x, TurboLayer) else None for x in self.layers]
        return {"policy": self.policy.name, "turbo": turbo, "stock": stock}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned.

        Raises InvalidInputError for anything else; the cache then stays as it was. Of layers with transformers' own
        cache only the names and types are checked.
        """
        if not isinstance(state, dict) or {*state} != {"policy", "turbo", "stock"}:
            raise invalid("state", "policy, turbo and stock", f"a value of type {type(state).__name__}")
        lists = [state["turbo"], state["stock"]]
        fits = all(isinstance(x, list) and len(x) == len(self.layers) for x in lists)
        if state["policy"] != self.policy.name or not fits:
            raise invalid("state", f"policy {self.policy.name!r} and {len(self.layers)} layers", state["policy"])
        ours: list[tuple[TurboLayer, SavedState]] = []
        others: list[tuple[CacheLayerMixin, dict[str, Any]]] = []
        for layer, turbo, stock in zip(self.layers, *lists, strict=True):
            if isinstance(layer, TurboLayer):
                ours.append((layer, layer.cache.read_state(turbo)))
            else:
                others.append((layer, _checked_stock(layer, stock)))
        for mine, saved in ours:
            mine._rearrange()
            mine.cache.take_over(saved)
            mine.is_initialized = mine.cache.length > 0
        for other, attributes in others:
            vars(other).update(attributes)

    def _stock_tensors(self) -> list[Tensor]:
        stock = [layer for layer in self.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
        return [x for layer in stock for x in (layer.keys, layer.values) if x is not None]


def _checked_stock(layer: CacheLayerMixin, state: Any) -> dict[str, Any]:
    """The public attributes of a layer of transformers' own; raises InvalidInputError where they are not such."""
    own = {name: type(value) for name, value in vars(layer).items() if not name.startswith("_")}
    kinds = own | {"keys": Tensor, "values": Tensor, "dtype": torch.dtype, "device": torch.device}
    names = {*state} if isinstance(state, dict) else set()
    if not {*own} <= names <= {*kinds}:
        raise invalid("state.stock", f"the names {', '.join(own)}", f"a value of type {type(state).__name__}")
    for name, value in state.items():
        if type(value) is not kinds[name] and not (name in ("keys", "values") and value is None):
            raise invalid(f"state.stock.{name}", f"a value of type {kinds[name].__name__}", type(value).__name__)
    return dict(state)


def stock_layers(text: PreTrainedConfig) -> list[CacheLayerMixin]:
    """transformers' own layers for a model; raises UnsupportedError for kinds we can't hold beside ours."""
    shape = model_shape(text)
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedError(f"{text.model_type}: multi-head latent attention stores no K and V per head")
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedError(f"{text.model_type}: layers that share the cache of other layers are not supported")
    layers: list[Any] = list(DynamicCache(config=text).layers)
    if not layers:
        layers = [DynamicLayer() for _ in range(shape.layers)]
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedError(f"{text.model_type}: layer {index} has a cache of kind {type(layer).__name__}")
    if not any(type(layer) is DynamicLayer for layer in layers):
        raise UnsupportedError(
            f"{text.model_type}: every layer has a sliding window; there is no full attention to compress"
        )
    return layers


class Enabled:
    """A model that uses TurboAttention until ``disable`` or the end of the ``with`` block.

    policy: of caches made from now on; a cache keeps the one it was made with. observer: looks at new caches.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy, stock: str) -> None:
        self.model, self.policy, self._stock = model, policy, stock
        self.observer: CacheObserver | None = None
        hook = _decoder(model).register_forward_pre_hook(self._supply_cache, with_kwargs=True)
        self._hook: RemovableHandle | None = hook
        model.set_attn_implementation(PREFIX + stock)

    def disable(self) -> None:
        """Give the model its own attention back. Calling it again does nothing."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self.model.set_attn_implementation(self._stock)

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def _supply_cache(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        wanted = kwargs.get("use_cache")
        if isinstance(cache, TurboCache):
            if cache.shape != model_shape(self.model.config):
                raise invalid("past_key_values", f"a cache for {model_shape(self.model.config)}", cache.shape)
            if self.observer is not None and not cache.turbo_layers[0].cache.length:
                self.observer.admit()
                self.observer.begin(cache)
            return None
        if cache is not None and any(isinstance(layer, TurboLayer) for layer in cache.layers):
            return None
        if cache is None:
            if not (self.model.config.get_text_config(decoder=True).use_cache if wanted is None else wanted):
                return None
        elif type(cache) is not DynamicCache or cache.get_seq_length() or cache.offloading:
            raise UnsupportedError(
                f"past_key_values: expected a TurboCache, received {type(cache).__name__}; "
                "pass TurboCache(model.config, policy) or leave it out"
            )
        if self.observer is not None:
            self.observer.admit()
        ours = TurboCache(self.model.config, self.policy)
        if cache is not None and any(getattr(layer, "record_past", False) for layer in cache.layers):
            ours.activate_past_recording()  # assisted generation: sliding-window layers must be able to go back
        if self.observer is not None:
            self.observer.begin(ours)
        if cache is not None:
            cache.layers = ours.layers  # whoever made the empty cache may pass it again
        return args, {**kwargs, "past_key_values": ours}


def enable(model: PreTrainedModel, policy: str | Policy = "turbo4") -> Enabled:
    """Switch a transformers model to TurboAttention.

    model: a decoder model on any device; policy: a preset's name or a Policy. As a call it returns a handle with
    ``disable()``; as a context manager it undoes itself. ``model.generate`` and ``model(...)`` then create a TurboCache
    where none is given. Calls without a cache (``use_cache=False``) have nothing to compress and use the stock
    attention. Raises UnsupportedError with the reason for a model that can't be switched, InvalidInputError for a
    policy that is not for this model.
    """
    if not isinstance(model, PreTrainedModel):
        raise invalid("model", "a transformers PreTrainedModel", type(model).__name__)
    stock = str(model.config._attn_implementation)
    kind = type(model).__name__
    if stock.startswith(PREFIX):
        raise UnsupportedError(f"{kind}: TurboAttention is already enabled; call disable() on its handle first")
    if stock not in _STOCK:
        raise UnsupportedError(
            f"{kind}: attention implementation {stock!r} can't serve beside ours; load the model with one of {_STOCK}"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"{kind}: encoder-decoder models are not supported")
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "alibi", False):
        raise UnsupportedError(f"{kind}: ALiBi position biases are not supported")
    if any(isinstance(getattr(module, "sinks", None), nn.Parameter) for module in model.modules()):
        raise UnsupportedError(f"{kind}: learned attention sinks are not supported")
    if not model._can_set_attn_implementation():
        raise UnsupportedError(f"{kind}: does not use transformers' attention interface")
    if not any(getattr(module, "is_causal", False) for module in model.modules()):
        raise UnsupportedError(f"{kind}: has no causal attention")
    resolved = Policy.resolve(policy)
    if resolved.attention.chunk_bits == 8 and getattr(text, "attn_logit_softcapping", None):
        raise UnsupportedError(f"{kind}: chunk_bits 8 has no form for soft-capped scores; use chunk_bits 16")
    TurboCache(model.config, resolved)  # raises now what a first forward would raise later
    _register(stock)
    return Enabled(model, resolved, stock)


def _decoder(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, nn.Module) else model


def _register(stock: str) -> None:
    name = PREFIX + stock
    AttentionInterface.register(name, _attention_over(stock))
    AttentionMaskInterface.register(name, _mask_over(stock))


def _attention_over(stock: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer = getattr(key, "_turbo_layer", None)
        if layer is None:
            mask = _stock_mask(stock, module, query, key, attention_mask)
            return _stock_attention(stock, module)(module, query, key, value, mask, **kwargs)
        if kwargs.get("dropout"):
            raise UnsupportedError("dropout: expected 0 with a compressed cache; call model.eval()")
        return attend_layer(layer, query, attention_mask, kwargs.get("scaling"), kwargs.get("softcap")), None

    return forward


def _stock_attention(stock: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if stock != "eager":
        function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[stock]
        return function
    # Each modelling file has an eager function of its own.
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager


def _stock_mask(stock: str, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """What the stock attention needs where ours would have taken a padding mask, or None."""
    skipped = mask is None and (stock == "sdpa" or not getattr(module, "is_causal", False))
    if skipped or (mask is not None and mask.dim() != 2):
        return mask
    made: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[stock](
        batch_size=query.shape[0],
        q_length=query.shape[2],
        kv_length=key.shape[2],
        q_offset=key.shape[2] - query.shape[2],
        mask_function=causal_mask_function,
        attention_mask=None if mask is None else mask.bool(),
        allow_is_causal_skip=False,
        dtype=query.dtype,
        config=module.config,
        device=query.device,
    )
    return made


def _mask_over(stock: str) -> Callable[..., Tensor | None]:
    def mask(mask_function: Callable[..., Any] = causal_mask_function, **kwargs: Any) -> Tensor | None:
        # Full attention gets the two-dimensional padding mask (or None), everything else what the stock attention
        # needs.
        chosen = flash_attention_mask if mask_function is causal_mask_function else ALL_MASK_ATTENTION_FUNCTIONS[stock]
        result: Tensor | None = chosen(mask_function=mask_function, **kwargs)
        return result

    return mask


def attend_layer(
    layer: TurboLayer, query: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attention of new tokens over their layer's cache, which is then compressed as far as it may be.

    query: ``[batch, heads, tokens, head_dim]``; mask: None or ``[batch, length]`` with zeros for left padding.
    Returns ``[batch, tokens, heads, head_dim]``.
    """
    layer.cache.set_padding(_left_padding(mask, layer.cache.length))
    layer.cache.observe(query)
    view = layer.cache.view()
    out = attend(query, view, scale=scaling, softcap=softcap, config=layer.policy.attention)
    if layer.observer is not None:
        layer.observer.attended(query, view, out, scaling, softcap)
    layer.cache.settle()
    return out.transpose(1, 2).contiguous()


def _left_padding(mask: Tensor | None, length: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] != length:
        raise UnsupportedError(
            f"attention_mask: expected [batch, {length}] with left padding, received shape {tuple(mask.shape)}; "
            "custom masks are not supported with a compressed cache"
        )
    real = mask.bool()
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise UnsupportedError("attention_mask: expected padding on the left only; set tokenizer.padding_side = 'left'")
    return torch.as_tensor((~real).sum(1), device=mask.device)
