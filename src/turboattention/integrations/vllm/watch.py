"""The watch inside an engine: which sequences of a step are looked at, and what their layers do about it.

A sequence is chosen when it begins, with the probability that the settings call share, and every step of it is checked:
over all sequences that is the same share of steps. Where Python does not run in decode (CUDA graphs), and where drafts
may be taken back, prompts alone are watched.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from turboattention.integrations.vllm.report import log
from turboattention.integrations.vllm.settings import PAGE_TOKENS
from turboattention.monitoring.kept import Kept
from turboattention.monitoring.metrics import watch_metrics
from turboattention.monitoring.reference import Reference
from turboattention.monitoring.sampling import Rotation, Sampler
from turboattention.monitoring.settings import WatchSettings
from turboattention.monitoring.shadow import one_head
from turboattention.monitoring.watcher import Watcher, watched_heads
from turboattention.ops.common.paged_kv import sequence
from turboattention.policy import Policy

if TYPE_CHECKING:
    from turboattention.integrations.vllm.impl import TurboAttentionImpl
    from turboattention.integrations.vllm.metadata import TurboMetadata

# Steps after which a sequence that did not come again is taken for finished (or preempted, which begins it anew).
GONE = 256


@dataclass
class _Sequence:
    """A watched sequence: its tokens and blocks so far, and the heads that are kept, by layer."""

    kept: dict[int, list[Kept]]
    tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    unseen: int = 0


class EngineWatch:
    """Of one group of layers in one process of an engine."""

    def __init__(
        self, settings: WatchSettings, policy: Policy, layers: dict[str, int], kv_heads: int, *,
        prompts_only: bool, rank: str = "0", reference: Reference | None = None, first_head: int = 0,
    ) -> None:  # fmt: skip
        """layers: index of each compressed layer by its name. kv_heads: of this process, from ``first_head``."""
        self.layers, self.prompts_only, self.sinks = layers, prompts_only, policy.cache.sink_tokens
        self.watcher = Watcher(settings, None, watch_metrics(), reference, rank, first_head)
        self._sampler = Sampler(settings.share, settings.seed)
        heads = watched_heads(policy, sorted(layers.values()), kv_heads)
        self._rotation = Rotation(heads, settings.seed)
        self._begun = 0
        self._live: list[_Sequence] = []

    def plan(
        self, new: "np.ndarray[Any, Any]", ends: "np.ndarray[Any, Any]", decodes: int, table: Tensor
    ) -> "StepWatch | None":
        """What to look at in a step, None for nothing.

        new: tokens of each sequence in it; ends: its tokens after it, bounds that are exact for prompts. decodes: how
        many sequences stand in front of the chunks of prompts. table: its blocks, read for watched sequences alone.
        """
        first = decodes if self.prompts_only else 0
        befores = ends - new
        able = np.flatnonzero((new > 0) & (np.arange(len(new)) >= first))
        if not len(able) and not self._live:
            return None
        rows: dict[int, _Sequence] = {}
        for watched in self._live:
            row = self._row_of(watched, able, befores, table, rows)
            watched.unseen = watched.unseen + 1 if row is None else 0
            if row is not None:
                rows[row] = watched
        self._live = [x for x in self._live if x.unseen <= GONE]
        for i in able[befores[able] == 0].tolist():
            self._begun += 1
            if self._sampler.takes(self._begun):
                rows[i] = self._begin()
        steps = int((ends[able] >= PAGE_TOKENS).sum())
        if steps:
            self.watcher.stepped(steps, sum(int(ends[i]) >= PAGE_TOKENS for i in rows))
        for i, watched in rows.items():
            watched.tokens = int(ends[i])
            watched.blocks = table[i, : -(-watched.tokens // PAGE_TOKENS)].tolist()
        starts = np.concatenate([[0], np.cumsum(new)])
        return StepWatch(self, [(i, int(starts[i]), int(starts[i + 1]), x) for i, x in rows.items()]) if rows else None

    def _begin(self) -> _Sequence:
        kept: dict[int, list[Kept]] = {}
        for layer, head in self._rotation.take(self.watcher.settings.heads):
            kept.setdefault(layer, []).append(Kept(layer, head, self.watcher.budget))
        self._live.append(_Sequence(kept))
        return self._live[-1]

    def _row_of(
        self, watched: _Sequence, able: "np.ndarray[Any, Any]", befores: "np.ndarray[Any, Any]", table: Tensor,
        taken: dict[int, _Sequence],
    ) -> int | None:  # fmt: skip
        # Blocks tell sequences apart; two that share all of them have the same tokens.
        for i in able[befores[able] == watched.tokens].tolist():
            if i not in taken and table[i, : len(watched.blocks)].tolist() == watched.blocks:
                return int(i)
        return None

    def drop(self, watched: _Sequence, reason: str, detail: object = "") -> None:
        """Watch a sequence no longer."""
        for kept in watched.kept.values():
            for one in kept:
                self.watcher.skip(reason, detail)
                one.drop()
        watched.kept = {}
        self._live = [x for x in self._live if x is not watched]


@dataclass(frozen=True)
class StepWatch:
    """One step. rows: number in the batch, first and end of the packed tokens, sequence."""

    engine: EngineWatch
    rows: list[tuple[int, int, int, _Sequence]]

    def look(
        self, name: str, impl: "TurboAttentionImpl", query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        meta: "TurboMetadata", output: Tensor,
    ) -> None:  # fmt: skip
        """A layer has stored the new tokens and attended; tensors as in its ``forward``."""
        layer = self.engine.layers[name]
        for number, first, end, watched in self.rows:
            if layer not in watched.kept:
                continue
            try:
                part = slice(first, end)
                self._check(layer, number, watched, impl, query[part], key[part], value[part], kv_cache, meta,
                            output[part])  # fmt: skip
            except RuntimeError as error:
                self.engine.drop(watched, "error", error)

    def _check(
        self, layer: int, number: int, watched: _Sequence, impl: "TurboAttentionImpl", query: Tensor, key: Tensor,
        value: Tensor, kv_cache: Tensor, meta: "TurboMetadata", output: Tensor,
    ) -> None:  # fmt: skip
        watcher, decodes = self.engine.watcher, meta.decodes
        watched.kept[layer] = [
            kept for kept in watched.kept[layer] if watcher.keep(kept, key[:, kept.head], value[:, kept.head])
        ]
        if not watched.kept[layer] or watched.tokens < PAGE_TOKENS:
            return
        chunk = number >= decodes
        numbers = meta.prefilling if chunk else meta.decoding
        assert numbers is not None  # the sequence is in it
        index = number - decodes if chunk else number
        view = impl.pages.view(kv_cache, numbers.part(index, index + 1), after=True)
        if chunk:
            # Of a prompt no token is a draft.
            view = replace(view, page_tokens=view.lengths // PAGE_TOKENS * PAGE_TOKENS)
        stored = sequence(view, 0)
        if any(kept.tokens != stored.length for kept in watched.kept[layer]):
            self.engine.drop(watched, "length", f"{stored.length} tokens stored, {watched.tokens} seen")
            return
        group = query.shape[1] // impl.num_kv_heads
        for kept in watched.kept[layer]:
            heads = slice(kept.head * group, (kept.head + 1) * group)
            # A chunk has read itself exactly: of it, what the next step will read is compared.
            out = None if chunk else output[:, heads].transpose(0, 1)
            watcher.check(
                kept, query[:, heads].transpose(0, 1), out, one_head(stored, 0, kept.head), impl.scale,
                sinks=self.engine.sinks,
            )  # fmt: skip


def engine_watch(vllm_config: Any, settings: WatchSettings, names: list[str], prompts_only: bool) -> EngineWatch | None:
    """The watch of the layers ``names`` in this process; None, said in the log, where they have nothing to compare."""
    from turboattention.integrations.vllm.impl import model_shape
    from turboattention.integrations.vllm.layers import compressed_layers

    found = compressed_layers(vllm_config, names)
    if not found:
        return None
    impl = next(iter(found.values()))
    indices = {name: next(int(part) for part in name.split(".") if part.isdigit()) for name in found}
    if not watched_heads(impl.policy, [0], 1):
        log.warning("TurboAttention: policy %s stores nothing below 16 bits: no watch", impl.policy.name)
        return None
    shape, parallel = model_shape(vllm_config), vllm_config.parallel_config
    reference, first = None, 0
    if settings.reference is not None:
        reference = Reference.load(settings.reference)
        reference.check(shape.layers, shape.kv_heads, shape.head_dim)
        ranks = int(parallel.tensor_parallel_size)
        if impl.num_kv_heads * ranks == shape.kv_heads:
            first = int(parallel.rank) % ranks * impl.num_kv_heads
        else:
            log.warning("TurboAttention: KV heads are copied to several ranks: no drift in the watch")
            reference = None
    log.info(
        "TurboAttention: watching %.4g %% of sequences, %s, with at most %.4g MiB",
        100 * settings.share, "their prompts" if prompts_only else "prompts and decode", settings.memory_mib,
    )  # fmt: skip
    return EngineWatch(
        settings, impl.policy, indices, impl.num_kv_heads, prompts_only=prompts_only, rank=str(parallel.rank),
        reference=reference, first_head=first,
    )  # fmt: skip
