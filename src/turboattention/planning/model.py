"""What a plan needs to know of a model, from its config alone: no weights are read."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from turboattention.errors import InvalidInputError, UnsupportedError, invalid
from turboattention.files import DOCUMENT, read_json
from turboattention.typed import short

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Each of these makes modules or lists in Python: a config of one line could ask for more than memory holds.
_COUNTED = ("layer", "depth", "block", "expert", "stage", "num_labels", "codebook")
_MOST_COUNTED = 4096
_LARGEST = 2**31  # any other whole number: widths, vocabulary, context


@dataclass(frozen=True)
class ModelFacts:
    """Shape of a decoder.

    windows: for each attention layer the tokens of its sliding window, None where it sees everything.
    parameters: all of them. read_parameters: those that a step over one token reads or multiplies (not the embedding
        table, where the output has one of its own). expert_parameters: the part of these in experts, of which a token
        uses expert_share.
    hidden: width of the state between layers. ranks: cards that share every layer; these are the numbers of one.
    context: most tokens that the model was made for. quantization: how the config says its weights are stored, or "".
    soft_capped: scores are, which the plugin of vLLM refuses.
    """

    name: str
    model_type: str
    windows: tuple[int | None, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    read_parameters: int
    expert_parameters: int
    expert_share: float
    hidden: int
    context: int
    quantization: str = ""
    soft_capped: bool = False
    ranks: int = 1

    @property
    def layers(self) -> int:
        return len(self.windows)

    @cached_property
    def kinds(self) -> dict[int | None, int]:
        """How many layers there are of each window."""
        return dict(Counter(self.windows))

    @property
    def full_layers(self) -> int:
        """Layers that see every token: those that are compressed."""
        return self.kinds.get(None, 0)

    def split(self, ranks: int) -> "ModelFacts":
        """What one of ``ranks`` cards has, as vLLM's tensor parallelism divides a model.

        Weights and heads are shared out; of fewer KV heads than cards each card has one, which others have too.
        Raises InvalidInputError where heads can't be.
        """
        if ranks < 1 or self.query_heads % ranks or (self.kv_heads % ranks and ranks % self.kv_heads):
            heads = f"{self.query_heads} query and {self.kv_heads} KV heads"
            raise invalid("tensor_parallel_size", f"a number of cards that can share {heads}", ranks)
        return replace(
            self, query_heads=self.query_heads // ranks, kv_heads=max(1, self.kv_heads // ranks), ranks=ranks,
            parameters=-(-self.parameters // ranks), read_parameters=-(-self.read_parameters // ranks),
            expert_parameters=-(-self.expert_parameters // ranks),
        )  # fmt: skip

    def active_parameters(self, tokens: float) -> float:
        """Parameters that a step over ``tokens`` tokens reads: an expert that no token chose is not read."""
        touched = 1 - math.pow(1 - self.expert_share, tokens)
        return self.read_parameters - self.expert_parameters * (1 - touched)


def read_model(name: str) -> ModelFacts:
    """The model of a config.json, a folder with one, a packaged name or a hub name in the local cache.

    Nothing is downloaded and no code of the model is run. Raises InvalidInputError for what is not such a config,
    UnsupportedError with the reason for caches that cannot be compressed: latent attention (MLA), recurrent or
    convolution layers beside attention, layers that share a cache, learned sinks, or a sliding window in every layer.
    """
    path = _config_file(name)
    data = read_json("model config", path, DOCUMENT, "a readable JSON file")
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise invalid("model config", "an object with model_type, as transformers writes it", str(path))
    return facts(name, data)


def _config_file(name: str) -> Path:
    from turboattention.integrations.converted_models import converted_copy
    from turboattention.integrations.packaged_models import PACKAGED_MODELS, default_cache_directory

    if name in PACKAGED_MODELS:
        return converted_copy(PACKAGED_MODELS[name], default_cache_directory()) / "config.json"
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        return path
    if name.count("/") == 1 and path.suffix != ".json":
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return Path(found)
    known = ", ".join(PACKAGED_MODELS)
    raise invalid(
        "model", f"a config.json, a folder with one, one of {known}, or a hub name in the local cache", repr(name)
    )


def facts(name: str, data: dict[str, Any]) -> ModelFacts:
    """What `read_model` returns for the content of a config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.cache_utils import DynamicSlidingWindowLayer

    from turboattention.integrations.models import quiet
    from turboattention.integrations.transformers import model_shape, stock_layers

    _check_sizes(data, "model config")
    fields = dict(data)
    model_type = fields.pop("model_type")
    quantization = fields.pop("quantization_config", None) or {}
    if not isinstance(quantization, dict):
        raise invalid("model config", "an object under quantization_config", short(quantization))
    with quiet():
        try:
            config: Any = AutoConfig.for_model(model_type, **fields)
            text = config.get_text_config(decoder=True)
        # Whatever transformers raises for values that fit no model becomes one line.
        except Exception as error:
            raise _unusable(name, error) from error
        try:
            shape = model_shape(config)
            layers = stock_layers(text)
            with torch.device("meta"):  # parameters without memory, so that each architecture counts itself
                model: Any = AutoModelForCausalLM.from_config(config)
        except UnsupportedError:
            raise
        except Exception as error:
            raise _unusable(name, error) from error
    sizes = {parameter: x.numel() for parameter, x in model.named_parameters()}
    if getattr(text, "alibi", False):
        raise UnsupportedError(f"{model_type}: ALiBi position biases are not supported")
    if any(parameter.endswith(".sinks") for parameter in sizes):
        raise UnsupportedError(f"{model_type}: learned attention sinks are not supported")
    _check_heads(model, model_type, shape.kv_heads * shape.head_dim)
    total, experts = sum(sizes.values()), sum(n for parameter, n in sizes.items() if ".experts." in parameter)
    table = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    untied = 0 if output is None or output.weight is table else table.numel()
    windows = tuple(x.sliding_window if isinstance(x, DynamicSlidingWindowLayer) else None for x in layers)
    return ModelFacts(
        name=name, model_type=model_type, windows=windows, query_heads=int(text.num_attention_heads),
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, parameters=total, read_parameters=total - untied,
        expert_parameters=experts, expert_share=_expert_share(text, experts),
        hidden=int(text.hidden_size), context=int(getattr(text, "max_position_embeddings", 0) or 2**31 - 1),
        quantization=str(quantization.get("quant_method", "unknown")) if quantization else "",
        soft_capped=bool(getattr(text, "attn_logit_softcapping", None)),
    )  # fmt: skip


def _check_sizes(data: Any, where: str) -> None:
    """Raise InvalidInputError for a whole number that no decoder has, before anything is made of it."""
    items: Any = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        # The last part of the name of a list is that of the list.
        place = where if isinstance(data, list) else f"{where}: {key}"
        if isinstance(value, int) and not isinstance(value, bool):
            counted = any(word in place.rpartition(": ")[2].lower() for word in _COUNTED)
            most = _MOST_COUNTED if counted else _LARGEST
            if not -most <= value <= most:
                raise invalid(place[:200], f"at most {most}", short(value))
        _check_sizes(value, place)


def _unusable(name: str, error: Exception) -> InvalidInputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return invalid("model config", "a decoder that transformers knows", f"{name} ({reason})")


def _check_heads(model: Any, model_type: str, width: int) -> None:
    """Raise where layers have K of another width than the config's KV heads: their bytes would be wrong."""
    for name, module in model.named_modules():
        if name.endswith(".k_proj") and "vision" not in name and getattr(module, "out_features", width) != width:
            raise UnsupportedError(
                f"{model_type}: {name} makes K of {module.out_features} values a token, the config says {width}; "
                "layers of different widths are not supported"
            )


def _expert_share(text: Any, experts: int) -> float:
    if not experts:
        return 1.0
    count = next((getattr(text, key) for key in _EXPERT_COUNTS if getattr(text, key, None)), None)
    used = getattr(text, "num_experts_per_tok", None)
    if not count or not used:
        raise UnsupportedError(f"{text.model_type}: the config does not say how many of its experts a token uses")
    return float(used) / float(count)
