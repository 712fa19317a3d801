"""Attention of one layer inside vLLM: append the new tokens, then read pages, open page and sinks."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from turboattention.errors import UnsupportedError
from turboattention.integrations.vllm.chunks import attend_chunks
from turboattention.integrations.vllm.drafts import Drafts, append_drafts, tail_capacity
from turboattention.integrations.vllm.integrity import BlockChecksums
from turboattention.integrations.vllm.metadata import Lengths, TurboMetadata
from turboattention.integrations.vllm.pool import OpenPages
from turboattention.integrations.vllm.settings import (
    PAGE_TOKENS,
    check_model,
    draft_tokens,
    page_layout,
    pool_rows,
    remember,
    resolve_integrity,
    resolve_policy,
)
from turboattention.ops.append import paged_append_for
from turboattention.ops.append.packed import add_packed_queries
from turboattention.ops.append.paged import add_step_queries
from turboattention.ops.prefill.over_cache import over_cache
from turboattention.policy import ModelShape

SLIDING_HINT = "--kv-cache-dtype-skip-layers sliding_window leaves such layers to vLLM's own backend"


class TurboAttentionImpl(AttentionImpl[TurboMetadata]):  # type: ignore[misc]  # vLLM is absent where types are checked
    """The layer's open pages and the order of its operations."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        """Arguments as every backend of vLLM. Raises UnsupportedError for what this one does not compute."""
        refuse(
            ("ALiBi", alibi_slopes is not None),
            (f"a sliding window in compressed pages ({SLIDING_HINT})", sliding_window is not None),
            ("soft-capped scores", bool(logits_soft_cap)),
            (f"attention of type {attn_type}", attn_type != AttentionType.DECODER),
            ("layers that read another layer's cache", kv_sharing_target_layer_name is not None),
            ("attention sinks of the model", extra.get("sinks") is not None),
        )
        config = get_current_vllm_config()
        refuse(*speculation(config))
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads, kv_cache_dtype
        self.policy = resolve_policy(kv_cache_dtype, config.additional_config)
        remember(self.policy)
        if self.policy.model is not None or self.policy.overrides:
            check_model(self.policy, model_shape(config), config.cache_config.kv_cache_dtype_skip_layers)
        layout = page_layout(self.policy.cache, head_size)
        # Here, because vLLM counts what is allocated before it measures the memory left for pages.
        device = torch.empty(0).device
        capacity = tail_capacity(draft_tokens(config))
        self.pages = OpenPages.allocate(
            layout, pool_rows(config), num_kv_heads, torch.get_default_dtype(), device, capacity
        )
        every = resolve_integrity(config.additional_config)
        if every and device.type == "cuda" and not config.model_config.enforce_eager:
            raise UnsupportedError("integrity: pages can't be verified in CUDA graphs; add --enforce-eager")
        self.checksums = BlockChecksums(layout.nbytes, every) if every else None
        self._append = paged_append_for([layout], device)
        if device.type == "cuda":
            from turboattention.ops.decode.launch import heads_tensor  # needs Triton

            heads_tensor(tuple(range(num_kv_heads)), device)  # a first copy from the host can't be part of a graph

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TurboMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store the new tokens and write attention of ``query`` ``[tokens, heads, head_dim]`` into ``output``."""
        if attn_metadata is None:  # a profiling run
            return output.zero_()
        meta = attn_metadata
        if self.checksums is not None:
            self.checksums.verify(str(getattr(layer, "layer_name", "layer")), kv_cache, meta)
        if meta.copies is not None and self.pages.power is not None:
            self._copy_statistics(*meta.copies)
        before = None
        if meta.prefilling is not None:
            # The open pages before the chunks, because the append overwrites them.
            before = self._snapshot(kv_cache, meta.prefilling) if meta.has_prefix else None
            self._append_chunks(query, key, value, kv_cache, meta)
        count = meta.decodes
        if meta.drafts is not None:
            self._decode_drafts(query, key, value, kv_cache, meta, meta.drafts, output)
        elif count:
            self._append_tokens(query[:count], key[:count], value[:count], kv_cache, meta.decoding)
            view = self.pages.view(kv_cache, meta.decoding, after=True)
            over_cache(query[:count].unsqueeze(2), view, scale=self.scale, out=output[:count].unsqueeze(2))
        if meta.prefilling is not None:
            first, last = meta.first_token, meta.chunk_starts[-1]
            part = slice(first, last)
            attend_chunks(
                query[part], key[part], value[part], before, meta, self.scale, self.policy.attention, output[part]
            )  # fmt: skip
        if self.checksums is not None:
            self.checksums.written(kv_cache, meta)
        if meta.watch is not None:
            meta.watch.look(str(layer.layer_name), self, query, key, value, kv_cache, meta, output)
        return output

    def _copy_statistics(self, source: Tensor, target: Tensor) -> None:
        power = self.pages.power
        assert power is not None  # the caller has looked
        power[-1] = 0.0
        power[target] = power[source]

    def _snapshot(self, kv_cache: Tensor, numbers: Lengths) -> Any:
        view = self.pages.view(kv_cache, numbers, after=False)
        key, value = (x.index_select(0, numbers.rows) for x in (view.tail_key, view.tail_value))
        return replace(view, tail_key=key, tail_value=value, tail_rows=None)

    def _append_tokens(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, numbers: Lengths) -> None:
        """One token of each sequence."""
        self._append(
            self.pages.view(kv_cache, numbers, after=False), key.unsqueeze(2), value.unsqueeze(2), when="after",
            fault=numbers.fault, counts=numbers.counts, query_power=self.pages.power, queries=query,
        )  # fmt: skip

    def _decode_drafts(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        meta: TurboMetadata,
        drafts: Drafts,
        output: Tensor,
    ) -> None:
        """A few tokens of each sequence, of which only the first is sure to stay (see `drafts`)."""
        numbers, part = meta.decoding, slice(0, meta.decode_tokens)
        queries = drafts.rows(query[part], drafts.right)
        if self.pages.power is not None:
            add_step_queries(
                self.pages.power, drafts.rows(query[part], drafts.left)[:, :, 0], numbers.rows, numbers.counts
            )
        append_drafts(
            self._append, self.pages.view(kv_cache, numbers, after=False),
            (drafts.rows(key[part], drafts.left), drafts.rows(value[part], drafts.left)), after=numbers.after,
            counts=numbers.counts, none=drafts.none, fault=numbers.fault, query_power=self.pages.power,
        )  # fmt: skip
        found = over_cache(queries, self.pages.view(kv_cache, numbers, after=True), scale=self.scale)
        output[part].copy_(drafts.tokens(found.out))

    def _append_chunks(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, meta: TurboMetadata) -> None:
        """The chunks of prompts."""
        numbers, packed, power = meta.prefilling, meta.packed, self.pages.power
        assert numbers is not None  # the caller has looked
        assert packed is not None  # always beside it
        if power is not None:
            assert meta.keep is not None  # as above
            power = add_packed_queries(
                power, query, packed, rows=numbers.rows, counts=numbers.counts, keep=meta.keep, lengths=numbers.before,
                page_size=self.pages.layout.page_size,
            )  # fmt: skip
        self._append(
            self.pages.view(kv_cache, numbers, after=False), key.transpose(0, 1)[None], value.transpose(0, 1)[None],
            when="after", fault=numbers.fault, counts=numbers.counts, query_power=power, packed=packed,
        )  # fmt: skip


def refuse(*reasons: tuple[str, bool]) -> None:
    """Raise UnsupportedError for the first reason that holds."""
    for reason, holds in reasons:
        if holds:
            raise UnsupportedError(f"backend TURBO_ATTENTION: {reason} is not supported; use another attention backend")


def speculation(config: Any) -> tuple[tuple[str, bool], ...]:
    """What of vLLM's speculative decoding is refused."""
    chosen = config.speculative_config
    if chosen is None:
        return ()
    return (
        (f"speculative decoding by {chosen.method!r} (only 'ngram')", chosen.method not in ("ngram", "ngram_gpu")),
        (f"{draft_tokens(config)} draft tokens (at most {PAGE_TOKENS})", draft_tokens(config) > PAGE_TOKENS),
    )


def model_shape(config: Any) -> ModelShape:
    """The model of an engine in the words of a policy."""
    model = config.model_config
    text = model.hf_text_config
    layers, heads = int(text.num_hidden_layers), int(model.get_total_num_kv_heads())
    return ModelShape(str(text.model_type), layers, heads, int(model.get_head_size()))
