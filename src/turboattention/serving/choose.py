"""Sides from what the command line says: an address, ``preset:NAME`` or ``policy:FILE``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turboattention.config import get_preset
from turboattention.errors import invalid
from turboattention.integrations.models import LoadedModel
from turboattention.policy import Policy
from turboattention.serving.answer import Side, SideName
from turboattention.serving.endpoint import Endpoint
from turboattention.serving.local import ORDINARY, LocalModel, LocalSide
from turboattention.serving.prompts import Api, Request
from turboattention.serving.secrets import Secret
from turboattention.serving.session import Settings


@dataclass(frozen=True)
class Spec:
    """model and key are for servers alone."""

    name: SideName
    text: str
    model: str | None = None
    key: Secret | None = None

    @property
    def local(self) -> bool:
        """Whether the side computes in this process."""
        return self.text.startswith(("preset:", "policy:"))


def make_sides(
    specs: Sequence[Spec],
    settings: Settings,
    api: Api | Literal["auto"],
    requests: Sequence[Request],
    load: Callable[[], LoadedModel],
) -> list[Side]:
    """``load`` is called once, after everything else has been checked, and only for local sides."""
    with_messages = next((request.id for request in requests if request.messages), None)
    if api == "completions" and with_messages is not None:
        raise invalid("--api", "chat or auto for requests with messages", f"completions and request {with_messages!r}")
    if settings.temperature > 0 and any(spec.local for spec in specs):
        raise invalid("--temperature", "0 for presets and policies, which answer greedily", settings.temperature)
    policies = {spec.name: _policy(spec) for spec in specs if spec.local}
    endpoints = {spec.name: _endpoint(spec, settings, api) for spec in specs if not spec.local}
    shared = LocalModel(load()) if policies else None
    sides: list[Side] = []
    for spec in specs:
        if shared is not None and spec.name in policies:
            sides.append(LocalSide(spec.name, shared, policies[spec.name]))
        else:
            sides.append(endpoints[spec.name])
    return sides


def _policy(spec: Spec) -> str | Policy | None:
    if spec.model is not None or spec.key is not None:
        raise invalid(f"--{spec.name}-model or a key", "a server", spec.text, "a preset's model is --model")
    kind, _, value = spec.text.partition(":")
    if kind == "policy":
        return Policy.load(Path(value))
    return None if value == ORDINARY else get_preset(value).name


def _endpoint(spec: Spec, settings: Settings, api: Api | Literal["auto"]) -> Endpoint:
    return Endpoint(
        name=spec.name,
        url=spec.text,
        model=spec.model,
        key=spec.key,
        api=api,
        timeout_s=settings.timeout_s,
        concurrency=settings.concurrency,
        temperature=settings.temperature,
        seed=settings.seed,
        logprobs=settings.logprobs,
    )
