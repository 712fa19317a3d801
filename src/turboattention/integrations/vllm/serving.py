"""The command that starts vLLM's own server with the plugin configured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turboattention.errors import invalid
from turboattention.files import parse_json
from turboattention.integrations.vllm.plugin import BACKEND
from turboattention.integrations.vllm.settings import (
    DTYPES,
    PAGE_TOKENS,
    SECTION,
    check_policy,
    layers_at_16_bits,
)
from turboattention.monitoring.settings import WatchSettings
from turboattention.policy import Policy

_DTYPE_OF_PRESET = {"turbo4": "turbo_int4", "turbo2": "turbo_int2"}
_SKIP = "--kv-cache-dtype-skip-layers"
_OURS = ("--attention-backend", "--block-size")  # options that the plugin decides


def serve_arguments(
    model: str, preset: str | None, policy: Path | None, options: Sequence[str], watch: dict[str, Any] | None = None
) -> list[str]:
    """Arguments of the command ``vllm``.

    preset, policy: at most one; None: turbo4. options: of ``vllm serve``, passed on as they are but for
    ``--additional-config``, which the policy and the settings of a watch join.
    Raises InvalidInputError for options that the plugin decides, UnsupportedError for a policy that engines can't hold.
    """
    if preset is not None and policy is not None:
        raise invalid("serve", "--preset or --policy", "both")
    rest, given = _taken("--additional-config", options)
    rest, dtype = _taken("--kv-cache-dtype", rest)
    for option in rest:
        name = option.split("=", 1)[0]
        if name in _OURS:
            raise invalid(name, "to be left out", option, f"the backend is {BACKEND}, blocks have {PAGE_TOKENS} tokens")
    if dtype is not None and (dtype not in DTYPES or preset is not None or policy is not None):
        known = f"one of {', '.join(DTYPES)}, without --preset and --policy"
        raise invalid("--kv-cache-dtype", known, dtype)
    chosen = preset or "turbo4"
    section: dict[str, Any] = {}
    skip: list[str] = []
    if policy is not None:
        loaded = Policy.load(policy)
        check_policy(loaded)
        skip = [str(layer) for layer in layers_at_16_bits(loaded)]
        section = {"policy": str(policy.resolve())}
    elif chosen not in _DTYPE_OF_PRESET:
        check_policy(Policy.from_preset(chosen))
        section = {"policy": chosen}
    if watch is not None:
        WatchSettings.of(watch)
        section = {**section, "watch": watch}
    # With a policy of its own the KV dtype only says that the cache is ours.
    dtype = dtype or _DTYPE_OF_PRESET.get(chosen, DTYPES[0])
    command = ["serve", model, "--attention-backend", BACKEND, "--kv-cache-dtype", dtype]
    command += ["--block-size", str(PAGE_TOKENS)]
    if skip:
        if any(option.split("=", 1)[0] == _SKIP for option in rest):
            raise invalid(_SKIP, "to be left out", "both", f"policy {policy} names the layers at 16 bits")
        command += [_SKIP, *skip]
    config = {**_object(given), **({SECTION: section} if section else {})}
    return [*command, *(["--additional-config", json.dumps(config)] if config else []), *rest]


def _taken(name: str, options: Sequence[str]) -> tuple[list[str], str | None]:
    """``options`` without ``name``, and its value."""
    rest, value, wanted = [], None, False
    for option in options:
        if wanted:
            value, wanted = option, False
        elif option == name:
            wanted = True
        elif option.startswith(f"{name}="):
            value = option.split("=", 1)[1]
        else:
            rest.append(option)
    if wanted:
        raise invalid(name, "a value", "none")
    return rest, value


def _object(text: str | None) -> dict[str, object]:
    try:
        found = parse_json(text or "{}")
    except ValueError as error:
        raise invalid("--additional-config", "JSON", f"{text!r} ({error})") from error
    if not isinstance(found, dict) or SECTION in found:
        raise invalid("--additional-config", f"an object without {SECTION!r}", text, "use --preset or --policy")
    return found
