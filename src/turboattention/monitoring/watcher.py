"""The part of a watch that every engine shares: takes checks, counts them, hands them to a guard."""

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboattention.monitoring import shadow
from turboattention.monitoring.guard import Guard
from turboattention.monitoring.kept import Budget, Kept
from turboattention.monitoring.reference import Reference
from turboattention.monitoring.settings import WatchSettings
from turboattention.monitoring.shadow import Check
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.policy import Policy

if TYPE_CHECKING:
    from turboattention.monitoring.metrics import WatchMetrics

log = logging.getLogger("turboattention.monitoring")


def watched_heads(policy: Policy, layers: list[int], kv_heads: int) -> list[tuple[int, int]]:
    """Layer and KV head of everything that ``policy`` stores below 16 bits in ``layers``."""
    return [
        (layer, head)
        for layer in layers
        for head, pair in enumerate(policy.head_formats(layer, kv_heads))
        if any(fmt.bits < 16 for fmt in pair)
    ]


def measurements(check: Check) -> list[tuple[str, float, float]]:
    """Of a check: measure, sum, and what to divide it by, as `Guard.add` takes them."""
    found = [("relative_error", check.relative_error, 1.0), ("kl", check.kl, 1.0)]
    for tensor, rates in check.codes.items():
        found.append((f"{tensor}_clipped", float(rates.clipped), float(rates.values)))
        found.append((f"{tensor}_saturated", float(rates.saturated), float(rates.values)))
    found += [(f"{tensor}_drift", abs(drift), 1.0) for tensor, drift in check.drift.items()]
    return found


class Watcher:
    """Checks of one process.

    A check that fails, for want of memory for example, is counted and logged once for each reason: a watch must never
    end an answer.
    """

    def __init__(
        self,
        settings: WatchSettings,
        guard: Guard | None = None,
        metrics: "WatchMetrics | None" = None,
        reference: Reference | None = None,
        rank: str = "0",
        first_head: int = 0,
    ) -> None:
        """first_head: of the model's KV heads, the one that is head 0 of this process."""
        self.settings, self.guard, self.metrics = settings, guard, metrics
        self.reference, self.rank, self.first_head = reference, rank, first_head
        self.budget = Budget(settings.memory)
        self.steps = self.checked_steps = self.checks = 0
        self.skipped: dict[str, int] = {}

    def stepped(self, steps: int, checked: int) -> None:
        """Steps of sequences that could be checked, and how many of them are."""
        self.steps += steps
        self.checked_steps += checked
        if self.metrics is not None:
            self.metrics.stepped(steps, checked, self.rank)
            if checked:
                self.metrics.holds(self.budget.used, self.rank)

    def skip(self, reason: str, detail: object = "") -> None:
        """A head that is watched no longer, or not this time."""
        if reason not in self.skipped:
            log.warning("watch: a head is left out (%s) %s", reason, " ".join(str(detail).split()))
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if self.metrics is not None:
            self.metrics.skipped(reason, self.rank)

    def keep(self, kept: Kept, key: Tensor, value: Tensor) -> bool:
        """Add exact ``[tokens, head_dim]``; False when the head is watched no longer because memory does not allow."""
        try:
            if kept.append(key, value):
                return True
            self.skip("memory", f"more than {self.settings.memory_mib:g} MiB of exact K and V")
        except RuntimeError as error:
            kept.drop()
            self.skip("error", error)
        return False

    @torch.inference_mode()
    def check(
        self,
        kept: Kept,
        query: Tensor,
        out: Tensor | None,
        stored: CachedKV,
        scale: float,
        *,
        softcap: float | None = None,
        sinks: int = 0,
        for_guard: bool = True,
    ) -> Check | None:
        """One head of one sequence.

        query, out: ``[heads, new, head_dim]`` of the query heads of ``kept``'s KV head, out None to compute it from
        what is stored. stored: as `shadow.one_head` gives it, of as many tokens as ``kept`` has. sinks: of the policy.
        for_guard: False for requests whose policy is not the present one: counted, but no reason for an alarm.
        """
        try:
            found = self._checked(kept, query, out, stored, scale, softcap, sinks)
        except RuntimeError as error:
            self.skip("error", error)
            return None
        self.checks += 1
        if self.metrics is not None:
            self.metrics.checked(found, self.rank)
        if self.guard is not None and for_guard:
            for measure, total, weight in measurements(found):
                self.guard.add(str(found.layer), measure, total, weight)
        return found

    def _checked(
        self, kept: Kept, query: Tensor, out: Tensor | None, stored: CachedKV, scale: float,
        softcap: float | None, sinks: int,
    ) -> Check:  # fmt: skip
        start = 0 if stored.starts is None else int(stored.starts[0])
        new = query.shape[1]
        rows = shadow.chosen_rows(new, self.settings.queries)
        exact = kept.read()
        values = shadow.stored_values(stored) if out is None else (shadow.stored_keys(stored), None)
        error, kl = shadow.attention_errors(
            query[:, rows], None if out is None else out[:, rows], exact, values, rows, new, scale, softcap, start
        )
        codes = shadow.codes_of_new_pages(stored, exact, kept.seen_pages, self.settings.pages, sinks, start)
        if stored.groups:
            kept.seen_pages = stored.page_tokens // stored.groups[0].layout.page_size
        drift: dict[str, float] = {}
        if self.reference is not None:
            spreads = self.reference.layers[kept.layer]
            drift = {
                name: spreads[name].drift(self.first_head + kept.head, x[start:])
                for name, x in zip(("key", "value"), exact, strict=True)
            }  # fmt: skip
        return Check(kept.layer, kept.head, kept.tokens, error, kl, codes, drift)
