"""A policy: what a model's cache looks like, per layer, head, K and V, with its provenance; saved as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from turboattention import config as configuration
from turboattention.checks import SUPPORTED_HEAD_DIMS, check_head_dim
from turboattention.config import (
    METADATA,
    OPEN_PAGES,
    SOFTMAXES,
    AttentionConfig,
    CacheConfig,
    Preset,
    TensorFormat,
    get_preset,
    with_bits,
)
from turboattention.errors import InvalidInputError, UnsupportedError, invalid
from turboattention.files import DOCUMENT, parse_json, read_bytes, write_atomic
from turboattention.quant.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerToken

FORMAT_VERSION = 1
_FORMAT_FIELDS = ("search", "refined_share", "refined_bits")  # of an override: left out of the file where None
_GRANULARITIES: dict[str, type] = {
    "per_token": PerToken,
    "per_channel": PerChannel,
    "per_group": PerGroup,
    "per_block": PerBlock,
}


@dataclass(frozen=True)
class ModelShape:
    """What a policy needs to know of a model, and refuses to be used without."""

    model_type: str
    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Override:
    """Other bits for a part of the model; None means all. Later overrides win.

    search, refined_share, refined_bits: these fields of the `TensorFormat` too, None to leave them as they are (refined
        channels are for K: ``tensor="key"``).
    """

    bits: int
    layer: int | None = None
    head: int | None = None
    tensor: Literal["key", "value", "both"] = "both"
    search: bool | None = None
    refined_share: float | None = None
    refined_bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in configuration.BITS:
            raise invalid("override bits", f"one of {', '.join(map(str, configuration.BITS))}", self.bits)
        if self.tensor not in ("key", "value", "both"):
            raise invalid("override tensor", "'key', 'value' or 'both'", repr(self.tensor))
        for name, index in (("layer", self.layer), ("head", self.head)):
            if index is not None and (not isinstance(index, int) or index < 0):
                raise invalid(f"override {name}", "0 or more, or null for all", index)
        for name, kinds in (("search", bool), ("refined_share", (int, float)), ("refined_bits", int)):
            given = getattr(self, name)
            if given is not None and (not isinstance(given, kinds) or isinstance(given, bool) != (name == "search")):
                raise invalid(f"override {name}", "a value as in a format, or null to leave it", repr(given))
        if self.tensor != "key" and (self.refined_share or self.refined_bits):
            raise invalid("override tensor", "'key' with refined channels", repr(self.tensor))

    def applied(self, fmt: TensorFormat) -> TensorFormat:
        """``fmt`` with what this override changes."""
        given = {name: getattr(self, name) for name in _FORMAT_FIELDS if getattr(self, name) is not None}
        return replace(with_bits(fmt, self.bits), **given)


@dataclass(frozen=True)
class Policy:
    """Formats of the cache and arithmetic of attention for one model, or for any when ``model`` is None."""

    name: str
    cache: CacheConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    overrides: tuple[Override, ...] = ()
    model: ModelShape | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_preset(cls, preset: str | Preset) -> "Policy":
        """The policy that a preset stands for."""
        preset = get_preset(preset) if isinstance(preset, str) else preset
        return cls(preset.name, preset.cache, preset.attention)

    @classmethod
    def resolve(cls, policy: "str | Policy") -> "Policy":
        """A policy as it is, or the preset of that name."""
        if not isinstance(policy, str | Policy):
            raise invalid("policy", "a preset's name or a Policy", type(policy).__name__)
        return policy if isinstance(policy, Policy) else cls.from_preset(policy)

    def head_formats(self, layer: int, kv_heads: int) -> list[tuple[TensorFormat, TensorFormat]]:
        """Formats of K and V of each KV head of ``layer``."""
        formats = []
        for head in range(kv_heads):
            key, value = self.cache.key, self.cache.value
            for override in self.overrides:
                if override.layer in (None, layer) and override.head in (None, head):
                    key = override.applied(key) if override.tensor in ("key", "both") else key
                    value = override.applied(value) if override.tensor in ("value", "both") else value
            formats.append((key, value))
        return formats

    def validate_for(self, shape: ModelShape) -> None:
        """Raise unless this policy fits a model: made for its shape, head_dim supported, overrides inside it."""
        if self.model is not None and self.model != shape:
            raise invalid("policy", f"a model like {self.model}", shape, "calibrate a policy for this model")
        for override in self.overrides:
            for name, index, count in (
                ("layer", override.layer, shape.layers),
                ("head", override.head, shape.kv_heads),
            ):
                if index is not None and index >= count:
                    raise invalid(f"override {name}", f"below {count}", index)
        if self.attention.chunk_bits == 8 and shape.head_dim not in SUPPORTED_HEAD_DIMS:
            known = ", ".join(map(str, SUPPORTED_HEAD_DIMS))
            reason = f"chunk_bits 8 needs a head_dim of {known}, not {shape.head_dim}; use chunk_bits 16"
            raise UnsupportedError(f"policy {self.name!r}: {reason}")
        formats = [pair for layer in range(shape.layers) for pair in self.head_formats(layer, shape.kv_heads)]
        for fmt in {fmt for pair in formats for fmt in pair if fmt.bits < 16}:
            check_head_dim(shape.head_dim)
            if isinstance(fmt.granularity, PerGroup) and shape.head_dim % fmt.granularity.size:
                raise UnsupportedError(
                    f"policy {self.name!r}: groups of {fmt.granularity.size} channels in head_dim {shape.head_dim}"
                )

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        try:
            text = json.dumps({"turboattention_policy": FORMAT_VERSION, **asdict_policy(self)}, indent=2)
        except TypeError as error:
            raise invalid("provenance", "values that JSON can hold", error) from error
        write_atomic(Path(path), text + "\n", "policy path")

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Read what `save` wrote; unknown keys, missing keys and wrong types are errors."""
        content = read_bytes("policy file", Path(path), DOCUMENT)
        try:
            data = parse_json(content)
        except ValueError as error:
            raise invalid("policy file", "JSON", f"{path}: {error}", "the file may be truncated") from error
        if not isinstance(data, dict) or data.pop("turboattention_policy", None) != FORMAT_VERSION:
            raise invalid(
                "policy file", f'"turboattention_policy": {FORMAT_VERSION}', path, "write it with Policy.save"
            )
        try:
            return _policy_from(data)
        except InvalidInputError as error:
            raise InvalidInputError(f"policy file {path}: {error}") from error
        except (TypeError, AttributeError) as error:
            raise invalid("policy file", "the fields that Policy.save writes", f"{path}: {error}") from error


def asdict_policy(policy: Policy) -> dict[str, Any]:
    """Plain data; granularities become their names."""
    data = asdict(policy)
    for side in ("key", "value"):
        granularity = getattr(policy.cache, side).granularity
        name = next(name for name, kind in _GRANULARITIES.items() if isinstance(granularity, kind))
        data["cache"][side]["granularity"] = {"kind": name, **asdict(granularity)}
    for override in data["overrides"]:
        for name in _FORMAT_FIELDS:
            if override[name] is None:
                del override[name]
    return data


def _build(kind: type, data: Any, where: str) -> Any:
    """A dataclass from a JSON object with exactly its fields (those with defaults may be missing)."""
    if not isinstance(data, dict):
        raise invalid(where, "an object", type(data).__name__)
    known = {f.name: f for f in fields(kind)}
    for key in data:
        if key not in known:
            raise invalid(where, f"the keys {', '.join(known)}", repr(key))
    for name, f in known.items():
        if name in data and f.type in (int, float, bool, str) and not _is_a(data[name], f.type):
            raise invalid(f"{where}.{name}", f"a value of type {f.type.__name__}", repr(data[name]))
    return kind(**data)


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _choice(where: str, data: dict[str, Any], key: str, choices: Sequence[Any]) -> None:
    if key in data and data[key] not in choices:
        raise invalid(f"{where}.{key}", f"one of {', '.join(map(str, choices))}", repr(data[key]))


def _format_from(data: Any, where: str) -> TensorFormat:
    granularity: Granularity = PerChannel()
    if isinstance(data, dict):
        _choice(where, data, "metadata", METADATA)
    if isinstance(data, dict) and "granularity" in data:
        given = dict(data["granularity"]) if isinstance(data["granularity"], dict) else {}
        name = given.pop("kind", None)
        if name not in _GRANULARITIES:
            raise invalid(f"{where}.granularity.kind", f"one of {', '.join(_GRANULARITIES)}", repr(name))
        granularity = _build(_GRANULARITIES[name], given, f"{where}.granularity")
        data = {key: value for key, value in data.items() if key != "granularity"}
    built = _build(TensorFormat, data, where)
    return replace(built, granularity=granularity) if isinstance(built, TensorFormat) else built


def _policy_from(data: dict[str, Any]) -> Policy:
    cache = data.get("cache")
    if isinstance(cache, dict):
        cache = dict(cache)
        for side in ("key", "value"):
            cache[side] = _format_from(cache.get(side), f"cache.{side}")
        _choice("cache", cache, "open_page", OPEN_PAGES)
    attention = dict(data.get("attention", {}))
    _choice("attention", attention, "softmax", SOFTMAXES)
    for key in ("query_bits", "probability_bits", "chunk_bits"):
        _choice("attention", attention, key, (8, 16))
    overrides = tuple(_build(Override, item, f"overrides[{i}]") for i, item in enumerate(data.get("overrides", [])))
    if not isinstance(data.get("provenance", {}), dict):
        raise invalid("provenance", "an object", type(data["provenance"]).__name__)
    model = data.get("model")
    fixed: dict[str, Any] = {
        "cache": _build(CacheConfig, cache, "cache"),
        "attention": _build(AttentionConfig, attention, "attention"),
        "overrides": overrides,
        "model": None if model is None else _build(ModelShape, model, "model"),
    }
    policy = _build(Policy, {**data, **fixed}, "policy")
    assert isinstance(policy, Policy)  # narrows the type; `_build` returns what it was asked for
    return policy
