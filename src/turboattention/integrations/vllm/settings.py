"""From vLLM's options to a policy and a page layout, or a refusal with its reason."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from turboattention.config import get_preset, presets
from turboattention.errors import UnsupportedError, invalid
from turboattention.monitoring.settings import WatchSettings
from turboattention.ops.append import supports
from turboattention.ops.dispatch import without_portable
from turboattention.policy import ModelShape, Policy
from turboattention.quant.layout import PageLayout

PAGE_TOKENS = 64  # of a kernel block; a power of two
INTEGRITY_STEPS = 16  # between two verifications of checksums, a debug mode
SECTION = "turboattention"  # of vLLM's --additional-config
DTYPES = ("turbo_int4", "turbo_k4v2", "turbo_int2")
OLD_RUNNER_SPARE = 4  # rows for each sequence of the older runner, whose rows are found again by their blocks


class _Engine:
    """The policy of the engine in this process: vLLM asks for page sizes outside of its configuration's context."""

    policy: Policy | None = None


def remember(policy: Policy) -> None:
    """The engine whose layers are being made uses this policy."""
    _Engine.policy = policy


def remembered() -> Policy:
    """What `remember` was told last; raises UnsupportedError before that."""
    if _Engine.policy is None:
        raise UnsupportedError("vLLM: asked for a page size before any layer was made")
    return _Engine.policy


def policy_of_dtype(dtype: str) -> Policy:
    """The policy that a KV dtype of this plugin stands for."""
    turbo4, turbo2 = get_preset("turbo4"), get_preset("turbo2")
    known = {
        "turbo_int4": Policy.from_preset(turbo4),
        "turbo_k4v2": Policy("turbo_k4v2", replace(turbo4.cache, value=turbo2.cache.value), turbo4.attention),
        "turbo_int2": Policy.from_preset(turbo2),
    }
    if dtype not in known:
        raise invalid("kv-cache-dtype", f"one of {', '.join(DTYPES)}", repr(dtype))
    return known[dtype]


def resolve_policy(dtype: str, additional_config: object) -> Policy:
    """The policy of an engine: the file or preset of ``additional_config``, else what the KV dtype stands for.

    dtype: vLLM's KV cache dtype; ``auto`` (the CPU tests) needs a policy in ``additional_config``.
    Raises InvalidInputError for unknown keys and unreadable files, UnsupportedError for a policy that pages of an
    engine can't hold.
    """
    named = _section(additional_config).get("policy")
    if named is None:
        return policy_of_dtype(dtype)
    policy = Policy.from_preset(named) if named in presets() else Policy.load(Path(str(named)))
    check_policy(policy)
    return policy


def resolve_watch(additional_config: object) -> WatchSettings | None:
    """The watch of an engine (``additional_config``), None without one; raises InvalidInputError for mistakes."""
    given = _section(additional_config).get("watch")
    return None if given is None else WatchSettings.of(given)


def resolve_integrity(additional_config: object) -> int:
    """Steps from one verification of the pages' checksums to the next (``additional_config``), 0 without them.

    ``true`` means INTEGRITY_STEPS. Raises InvalidInputError for anything but that and a number.
    """
    given = _section(additional_config).get("integrity", False)
    if not isinstance(given, int) or given < 0:
        raise invalid(f"additional-config {SECTION!r} integrity", "true, or a number of steps", repr(given))
    return INTEGRITY_STEPS * given if isinstance(given, bool) else given


def _section(additional_config: object) -> Mapping[str, Any]:
    section: Any = additional_config.get(SECTION, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(section, Mapping) or set(section) - {"policy", "watch", "integrity"}:
        expected = '{"policy": preset or file, "watch": settings of a watch, "integrity": true}, all optional'
        raise invalid(f"additional-config {SECTION!r}", expected, section)
    return section


def check_policy(policy: Policy) -> None:
    """Raise UnsupportedError with the reason unless every page of every layer can look the same and be read."""
    cache = policy.cache
    reasons = (
        (cache.page_size != PAGE_TOKENS, f"pages of {cache.page_size} tokens, not {PAGE_TOKENS}"),
        (cache.recent_window > 0, "a recent window"),
        (cache.open_page != "exact" or cache.low_priority_heads > 0, "the paper's clamped buffer or mixed heads"),
        (not policy.attention.plain, policy.attention.described),
    )
    for refused, reason in reasons:
        if refused:
            raise UnsupportedError(f"vLLM with policy {policy.name!r}: {reason}; use a turbo preset")
    layers_at_16_bits(policy)


def layers_at_16_bits(policy: Policy) -> tuple[int, ...]:
    """Layers that the policy's overrides leave at 16 bits: vLLM's skip list.

    Raises UnsupportedError for other overrides: vLLM gives one page size to all layers of a KV dtype, and pages of
    fewer bits would save nothing in it.
    """
    layers = set()
    for override in policy.overrides:
        whole = override.layer is not None and override.head is None and override.tensor == "both"
        if override.bits != 16 or not whole or override.layer is None:
            part = f"layer {override.layer}, head {override.head}, {override.tensor}: {override.bits} bits"
            raise UnsupportedError(
                f"vLLM with policy {policy.name!r}: override of {part}; all pages of an engine have the same format, "
                "and only whole layers can be left at 16 bits"
            )
        layers.add(override.layer)
    return tuple(sorted(layers))


def check_model(policy: Policy, shape: ModelShape, skipped: Sequence[str]) -> None:
    """Raise unless a policy fits the model of an engine and the skip list of its cache configuration.

    skipped: vLLM's ``kv_cache_dtype_skip_layers``.
    """
    policy.validate_for(shape)
    missing = [str(layer) for layer in layers_at_16_bits(policy) if str(layer) not in skipped]
    if missing:
        raise invalid(
            "kv-cache-dtype-skip-layers", f"{' '.join(missing)} too, which policy {policy.name!r} leaves at 16 bits",
            " ".join(skipped) or "none", "turboattention serve sets it",
        )  # fmt: skip


@lru_cache(maxsize=64)
def page_layout(policy_cache: Any, head_dim: int) -> PageLayout:
    """The layout of a page with the exact sinks of its sequence behind the codes.

    policy_cache: the policy's CacheConfig. Raises UnsupportedError for formats that the kernels don't read or write.
    """
    layout = PageLayout(
        policy_cache.page_size, head_dim, policy_cache.key, policy_cache.value, policy_cache.sink_tokens
    )
    reason = supports(layout) or without_portable(layout)
    if reason:
        raise UnsupportedError(f"vLLM: {reason}; use a turbo preset or int8")
    return layout


def has_stable_rows(vllm_config: Any) -> bool:
    """Whether the runner says which row of its state each sequence has (Model Runner V2)."""
    from vllm.platforms import current_platform

    return bool(getattr(vllm_config, "use_v2_model_runner", False)) and not current_platform.is_cpu()


def pool_rows(vllm_config: Any) -> int:
    """Rows of the open-page pool: one for each sequence and one for padding."""
    sequences = int(vllm_config.scheduler_config.max_num_seqs)
    return (sequences if has_stable_rows(vllm_config) else OLD_RUNNER_SPARE * sequences) + 1


def draft_tokens(vllm_config: Any) -> int:
    """Draft tokens of a sequence in a step, 0 without speculative decoding."""
    chosen = vllm_config.speculative_config
    return 0 if chosen is None else int(chosen.num_speculative_tokens or 0)
