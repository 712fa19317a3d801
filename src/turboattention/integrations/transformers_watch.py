"""The watch of an enabled transformers model: exact K and V of a few heads of each request, checked now and then."""

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from turboattention.errors import UnsupportedError, invalid
from turboattention.integrations.transformers import Enabled, TurboCache, TurboLayer, model_shape
from turboattention.monitoring.guard import Guard, Observer, Response
from turboattention.monitoring.kept import Kept
from turboattention.monitoring.limits import Limit, default_limits
from turboattention.monitoring.reference import Reference
from turboattention.monitoring.responses import InBackground, Log, RaisePrecision, Refuse, Webhook
from turboattention.monitoring.sampling import Rotation, Sampler
from turboattention.monitoring.settings import WatchSettings
from turboattention.monitoring.shadow import one_head
from turboattention.monitoring.watcher import Watcher, watched_heads
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.policy import Policy

if TYPE_CHECKING:
    from turboattention.monitoring.metrics import WatchMetrics

RESPONSES = ("log", "raise", "refuse")


class Watch:
    """Looks at the requests of an enabled model until ``close`` or the end of a ``with`` block.

    A request is a new cache; of a batch one sequence is watched. watcher: counts; guard: limits and alarms; refuse: its
    ``reset()`` lets requests in again.
    """

    def __init__(self, enabled: Enabled, watcher: Watcher, refuse: Refuse | None = None) -> None:
        self.enabled, self.watcher, self.refuse = enabled, watcher, refuse
        self.generation = 0  # of the policy: requests of an older one are no reason for an alarm
        self.requests = 0
        settings = watcher.settings
        self.sampler = Sampler(settings.share, settings.seed)
        self._rotation: Rotation | None = None

    @property
    def guard(self) -> Guard:
        """Its alarms are in ``guard.alarms``."""
        assert self.watcher.guard is not None  # `watch` makes one
        return self.watcher.guard

    def use(self, policy: Policy, layer: str) -> None:
        """New requests get ``policy``; what was measured of ``layer`` with the one before counts no more."""
        self.enabled.policy = policy
        self.generation += 1
        self._rotation = None
        self.guard.forget(layer)

    def admit(self) -> None:
        if self.refuse is not None:
            self.refuse.admit()

    def begin(self, cache: TurboCache) -> None:
        if self._rotation is None:
            self._rotation = Rotation(_heads(cache), self.watcher.settings.seed + self.generation)
        for used in cache.turbo_layers:
            used.observer = None  # of a request before, in a cache that was emptied
        request = _Request(self, self.requests)
        self.requests += 1
        by_layer: dict[int, list[Kept]] = {}
        for layer, head in self._rotation.take(self.watcher.settings.heads):
            by_layer.setdefault(layer, []).append(Kept(layer, head, self.watcher.budget))
        for number, layer in enumerate(sorted(by_layer)):
            turbo = cache.layers[layer]
            assert isinstance(turbo, TurboLayer)  # `_heads` names no others
            sinks = turbo.policy.cache.sink_tokens
            turbo.observer = _LayerWatch(request, by_layer[layer], sinks, leads=number == 0)

    def close(self) -> None:
        """Look at no new requests; those under way are watched to their end."""
        if self.enabled.observer is self:
            self.enabled.observer = None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Request:
    """What the watched layers of one cache share."""

    def __init__(self, watch: Watch, number: int) -> None:
        self.watch, self.number, self.generation = watch, number, watch.generation

    def row(self, batch: int) -> int:
        """The sequence of a batch that is watched."""
        return self.number % batch


class _LayerWatch:
    """The watched heads of one layer of one request. leads: counts the steps of the request."""

    def __init__(self, request: _Request, kept: list[Kept], sinks: int, leads: bool) -> None:
        self.request, self.kept, self.sinks, self.leads = request, kept, sinks, leads
        self.step = 0

    def appended(self, key: Tensor, value: Tensor) -> None:
        row = self.request.row(key.shape[0])
        keep = self.request.watch.watcher.keep
        self.kept = [kept for kept in self.kept if keep(kept, key[row, kept.head], value[row, kept.head])]

    def attended(
        self, query: Tensor, view: CachedKV, out: Tensor, scaling: float | None, softcap: float | None
    ) -> None:
        if not view.page_tokens or not (self.kept or self.leads):
            return
        watch = self.request.watch
        self.step += 1
        checked = watch.sampler.takes(self.request.number, self.step)
        if self.leads:
            watch.watcher.stepped(1, int(checked))
        if not checked:
            return
        row, group = self.request.row(query.shape[0]), query.shape[1] // view.num_kv_heads
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        for kept in self.kept:
            heads = slice(kept.head * group, (kept.head + 1) * group)
            watch.watcher.check(
                kept, query[row, heads], out[row, heads], one_head(view, row, kept.head), scale, softcap=softcap,
                sinks=self.sinks, for_guard=self.request.generation == watch.generation,
            )  # fmt: skip

    def cropped(self, length: int) -> None:
        for kept in self.kept:
            kept.crop(length)

    def rearranged(self) -> None:
        for kept in self.kept:
            self.request.watch.watcher.skip("batch rearranged")
            kept.drop()
        self.kept = []


def watch(
    enabled: Enabled,
    settings: WatchSettings | None = None,
    *,
    limits: Sequence[Limit] | None = None,
    respond: Sequence[str] = ("log",),
    webhook: str | None = None,
    metrics: "WatchMetrics | None" = None,
    observer: Observer | None = None,
) -> Watch:
    """Watch the requests of an enabled model from now on. Answers stay the same to the bit.

    settings: how much is checked. limits: None for the default ones. respond: any of ``log``, ``raise`` (the next level
    of bits for the layer, in new requests) and ``refuse`` (new requests raise RefusedError). webhook: an address that
    gets each alarm, in the background. metrics, observer: for Prometheus (`WatchMetrics`, `GuardMetrics`).
    Raises InvalidInputError for settings that don't fit, UnsupportedError for a policy without compressed layers and
    for a model that is watched already.
    """
    settings = settings or WatchSettings()
    for name in respond:
        if name not in RESPONSES:
            raise invalid("respond", f"some of {', '.join(RESPONSES)}", repr(name))
    if enabled.observer is not None:
        raise UnsupportedError("watch: the model is watched already; close() the other watch first")
    shape = model_shape(enabled.model.config)
    if not _heads(TurboCache(enabled.model.config, enabled.policy)):
        raise UnsupportedError(f"watch: policy {enabled.policy.name!r} stores nothing below 16 bits to compare")
    reference = None
    if settings.reference is not None:
        reference = Reference.load(settings.reference)
        reference.check(shape.layers, shape.kv_heads, shape.head_dim)
    responses: list[Response] = [Log()] if "log" in respond else []
    responses += [InBackground(Webhook(webhook))] if webhook is not None else []
    refuse = Refuse() if "refuse" in respond else None
    guard = Guard(default_limits() if limits is None else limits, responses, observer)
    found = Watch(enabled, Watcher(settings, guard, metrics, reference), refuse)
    if "raise" in respond:
        guard.responses.append(RaisePrecision(lambda: enabled.policy, found.use, shape.kv_heads))
    if refuse is not None:
        guard.responses.append(refuse)
    enabled.observer = found
    return found


def _heads(cache: TurboCache) -> list[tuple[int, int]]:
    layers = [index for index, layer in enumerate(cache.layers) if isinstance(layer, TurboLayer)]
    return watched_heads(cache.policy, layers, cache.shape.kv_heads)
