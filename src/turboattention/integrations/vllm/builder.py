"""What a step of the engine is, made once for all layers, outside of CUDA graphs.

What imports vLLM's layers is imported where it is used: vLLM may ask for this backend before it has them.
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from turboattention.errors import UnsupportedError
from turboattention.integrations.vllm.drafts import Drafts
from turboattention.integrations.vllm.faults import FaultWatch
from turboattention.integrations.vllm.metadata import Lengths, TurboMetadata
from turboattention.integrations.vllm.metrics import metrics
from turboattention.integrations.vllm.parts import parts_of
from turboattention.integrations.vllm.report import log, say
from turboattention.integrations.vllm.rows import RowMap
from turboattention.integrations.vllm.settings import (
    PAGE_TOKENS,
    draft_tokens,
    has_stable_rows,
    pool_rows,
    resolve_watch,
)
from turboattention.integrations.vllm.transfer import to_device
from turboattention.ops.append.packed import Packed

if TYPE_CHECKING:
    from turboattention.integrations.vllm.watch import EngineWatch, StepWatch


class TurboMetadataBuilder(AttentionMetadataBuilder[TurboMetadata]):  # type: ignore[misc]  # vLLM is absent where types are checked
    """Builds `TurboMetadata` in buffers that keep their addresses, because captured graphs read them."""

    reorder_batch_threshold = 1

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Of decode: steps of one token, with speculation of one and all drafts."""
        graphs = AttentionCGSupport
        return graphs.UNIFORM_BATCH if draft_tokens(vllm_config) else graphs.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._widest = 1 + draft_tokens(vllm_config)
        self.kv_heads = int(kv_cache_spec.num_kv_heads)
        sequences = int(vllm_config.scheduler_config.max_num_seqs)
        self.spare_row = pool_rows(vllm_config) - 1
        self._map = None if has_stable_rows(vllm_config) else RowMap(self.spare_row, self._widest - 1)
        if self._map is not None and device.type != "cpu":
            raise UnsupportedError("vLLM's older model runner on a GPU: rows of the open pages need the newer one")
        # The numbers of `Lengths`; a captured batch may be padded a little beyond max_num_seqs.
        self._numbers = torch.zeros(9, -(-sequences // 64) * 64, dtype=torch.int32, device=device)
        self._table: Tensor | None = None
        self._heads = torch.arange(self.kv_heads, dtype=torch.int32, device=device)[:, None]
        self._ends: dict[int, int] = {}  # tokens after the last chunk of each row, to know when a row begins anew
        self._rank = str(vllm_config.parallel_config.rank)
        self._faults = FaultWatch(self._numbers[7], self._count_fault)
        self._invented = False  # whether the steps before had no requests behind them
        # Made with the first real step, when the layers have their cache.
        self._wanted_watch = resolve_watch(vllm_config.additional_config)
        self._engine_watch: EngineWatch | None = None
        # vLLM captures graphs with a small cache first, before it knows how many blocks there are.
        self._unreported = vllm_config.cache_config.num_gpu_blocks is not None
        self._cold = device.type == "cuda"

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TurboMetadata:
        common: Any = common_attn_metadata
        count = int(common.num_reqs)
        self._watch(common)
        starts: np.ndarray[Any, Any] = common.query_start_loc_cpu[: count + 1].numpy()
        new = np.diff(starts)
        longer = np.flatnonzero(new > self._widest)
        decodes = int(longer[0]) if len(longer) else count
        seen = common.seq_lens_cpu_upper_bound
        ends = None if seen is None else seen[:count].numpy()
        numbers, copies = self._fill(common, count, new, ends)
        if common.req_idx is not None and common.is_prefilling is not None and ends is not None:
            self._begin_anew(common, decodes, new, ends)
        meta = TurboMetadata(decodes, numbers.part(0, decodes), int(common.num_actual_tokens), copies=copies)
        meta.decode_tokens = int(starts[decodes])
        if meta.decode_tokens > decodes:
            meta.drafts = Drafts.of(new[:decodes], self._numbers[8, :decodes])
        if decodes < count:
            meta.prefilling = numbers.part(decodes, count)
            meta.first_token = int(starts[decodes])
            meta.chunk_starts = tuple(int(x) for x in starts[decodes:])
            meta.cu = (common.query_start_loc[decodes : count + 1] - meta.first_token).to(torch.int32)
            meta.packed = Packed(common.query_start_loc[decodes:count], int(new[decodes:].max()))
            meta.has_prefix = ends is None or bool((ends[decodes:] > new[decodes:]).any())
            if meta.has_prefix and self.device.type != "cpu":
                # Where vLLM knows no bound the table has one.
                most = int(common.block_table_tensor.shape[1]) * PAGE_TOKENS
                contexts = [most] * (count - decodes) if ends is None else ends[decodes:].tolist()
                from_zero = [start - meta.first_token for start in meta.chunk_starts]
                meta.parts = parts_of(meta.cu, from_zero, meta.prefilling.after, contexts)
            meta.keep = self._kept(common.req_idx, decodes, count, new, ends)
        if self._wanted_watch is not None and not self._invented and ends is not None:
            meta.watch = self._watched(new, ends, decodes, common.block_table_tensor)
        return meta

    def _watched(
        self, new: "np.ndarray[Any, Any]", ends: "np.ndarray[Any, Any]", decodes: int, table: Tensor
    ) -> "StepWatch | None":
        from turboattention.integrations.vllm.watch import engine_watch

        if self._engine_watch is None and self._wanted_watch is not None:
            prompts_only = self.device.type == "cuda" or self._widest > 1
            self._engine_watch = engine_watch(self.vllm_config, self._wanted_watch, self.layer_names, prompts_only)
            if self._engine_watch is None:
                self._wanted_watch = None
                return None
        assert self._engine_watch is not None  # made above
        return self._engine_watch.plan(new, ends, decodes, table)

    def _fill(
        self, common: Any, count: int, new: "np.ndarray[Any, Any]", ends: "np.ndarray[Any, Any] | None"
    ) -> tuple[Lengths, tuple[Tensor, Tensor] | None]:
        """The device's numbers of all sequences, by operations that do not wait for it."""
        if count > self._numbers.shape[1]:
            raise UnsupportedError(f"vLLM: a batch of {count} sequences, more than max_num_seqs; use smaller graphs")
        before, after, paged_before, paged_after, counts, rows, sinks, fault, _ = self._numbers[:, :count]
        table = common.block_table_tensor[:count]
        torch.sub(common.query_start_loc[1 : count + 1], common.query_start_loc[:count], out=counts)
        # Padding has no tokens, whatever an earlier batch left in its length.
        torch.mul(common.seq_lens[:count], counts > 0, out=after)
        torch.sub(after, counts, out=before)
        sure = after if self._widest == 1 else before + counts.clamp(max=1)
        for tokens, paged in ((before, paged_before), (sure, paged_after)):
            torch.bitwise_and(tokens, -PAGE_TOKENS, out=paged)  # whole pages
        sinks.copy_(table[:, 0])
        if self._table is None or self._table.shape[-1] != table.shape[1]:
            shape = (self._numbers.shape[1], self.kv_heads, table.shape[1])
            self._table = torch.zeros(shape, dtype=torch.int32, device=self.device)
        pages = self._table[:count]
        torch.add(self._heads, table[:, None], alpha=self.kv_heads, out=pages)
        copies = None
        if self._map is None:
            index = np.full(count, self.spare_row, dtype=np.int32)
            if common.req_idx is not None:
                known = common.req_idx[:count]
                index[: len(known)] = known
            rows.copy_(to_device(index, rows.device))
        else:
            copies = self._rows_by_blocks(rows, before.tolist(), after.tolist(), table, new)
        return Lengths(before, after, paged_before, paged_after, counts, rows, sinks, pages, fault), copies

    def _rows_by_blocks(
        self, rows: Tensor, before: list[int], after: list[int], table: Tensor, new: "np.ndarray[Any, Any]"
    ) -> tuple[Tensor, Tensor]:
        assert self._map is not None  # the caller's case
        real = [i for i in range(len(before)) if new[i] > 0]
        blocks = [table[i].tolist() for i in real]
        assigned = self._map.assign([before[i] for i in real], [after[i] for i in real], blocks)
        rows.fill_(self.spare_row)
        for i, entry in zip(real, assigned, strict=True):
            rows[i] = entry.row
        moved = [entry for entry in assigned if entry.row != entry.source]
        source = [self.spare_row if entry.source is None else entry.source for entry in moved]
        return torch.tensor(source, dtype=torch.int64), torch.tensor([entry.row for entry in moved], dtype=torch.int64)

    def _watch(self, common: Any) -> None:
        """Faults of the steps before, and once the compilation and the report of the start."""
        if self._cold:
            self._cold = False
            self._warm_up(int(common.block_table_tensor.shape[1]))
        if self._unreported:
            from turboattention.integrations.vllm.layers import compressed_layers, start_report

            self._unreported = False
            # Of several groups of layers the first speaks for all.
            if next(iter(compressed_layers(self.vllm_config))) in self.layer_names:
                report = start_report(self.vllm_config)
                if self._rank == "0":
                    say(report)
                metrics().started(report, self._rank)
        if self._map is None and common.req_idx is None:
            self._invented = True
            return
        if self._invented:
            self._faults.forget()
            self._invented = False
        self._faults.look()

    def _warm_up(self, blocks: int) -> None:
        from turboattention.integrations.vllm.layers import compressed_layers
        from turboattention.integrations.vllm.warmup import warm_up

        began = time.perf_counter()
        formats = warm_up(
            compressed_layers(self.vllm_config, self.layer_names).values(), sequences=self._numbers.shape[1],
            blocks=blocks, spare_row=self.spare_row, width=self._widest,
        )  # fmt: skip
        if self._rank == "0":
            log.info("TurboAttention: kernels of %d formats ready in %.1f s", formats, time.perf_counter() - began)

    def _count_fault(self, kind: str, sequences: int) -> None:
        metrics().faults.labels(self._rank, kind).inc(sequences)

    def _begin_anew(self, common: Any, decodes: int, new: "np.ndarray[Any, Any]", ends: "np.ndarray[Any, Any]") -> None:
        """Clear the query statistics of rows where a request begins with a step that looks like decode."""
        begun = []
        for i in np.flatnonzero(common.is_prefilling[:decodes].numpy()):
            row, end = int(common.req_idx[i]), int(ends[i])
            if self._ends.get(row) != end - int(new[i]):
                begun.append(row)
            self._ends[row] = end
        if begun:
            from turboattention.integrations.vllm.layers import compressed_layers

            rows = torch.tensor(begun, device=self.device)
            for layer in compressed_layers(self.vllm_config, self.layer_names).values():
                if layer.pages.power is not None:
                    layer.pages.power.index_fill_(0, rows, 0.0)

    def _kept(
        self,
        req_idx: "np.ndarray[Any, Any] | None",
        first: int,
        count: int,
        new: "np.ndarray[Any, Any]",
        ends: "np.ndarray[Any, Any] | None",
    ) -> Tensor:
        """0 for chunks whose row held another request before; the older runner says that by its copies."""
        keep = np.ones(count - first, dtype=np.float32)
        if req_idx is not None and ends is not None:
            for i in range(first, min(count, len(req_idx))):
                row, end = int(req_idx[i]), int(ends[i])
                keep[i - first] = self._ends.get(row) == end - int(new[i])
                self._ends[row] = end
        return to_device(keep, self.device)
