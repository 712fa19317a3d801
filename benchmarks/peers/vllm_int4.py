"""vLLM's ``int4_per_token_head``: rotated, asymmetric 4-bit codes, a scale for each token and head, paged decode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peers.paging import paged_slots
from peers.vllm_parts import OPS, load
from turboattention.bench.data import Cache16

PAGE = 16  # tokens: vLLM's default
SEGMENTS = 16  # of a sequence, in its split kernel
LARGEST_SPLIT_BATCH = 128  # sequences x KV heads up to which it splits


def prepare(cache: Cache16) -> Callable[[Tensor], Tensor]:
    """As `turboattention.bench.baselines.DecodeBaseline`."""
    kernels: Any = load(f"{OPS}.int4_per_token_head")
    dim, heads, device = cache.key.shape[-1], cache.kv_heads, cache.key.device
    key, value, slots, table, lengths = paged_slots(cache, PAGE)
    pages = int(table.max()) + 1
    key_cache = torch.zeros(pages, PAGE, heads, dim // 2, dtype=torch.uint8, device=device)
    value_cache = torch.zeros_like(key_cache)
    key_scale = torch.ones(pages, PAGE, heads, dtype=torch.float32, device=device)
    value_scale = torch.ones_like(key_scale)
    kernels.reshape_and_cache_int4(
        key, value, key_cache, value_cache, slots, k_scale_cache=key_scale, v_scale_cache=value_scale
    )
    del key, value
    batch = len(cache.lengths)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    buffers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def attend(q: Tensor) -> Tensor:
        count = q.shape[1]
        if count not in buffers:
            shape = (batch, count, SEGMENTS)
            sums = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2)]
            buffers[count] = (torch.empty(*shape, dim, dtype=torch.float32, device=device), *sums)
        rows = q.squeeze(2)
        out = torch.empty_like(rows)
        kernels.unified_attention_int4(
            rows, key_cache, value_cache, out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lengths,
            max_seqlen_k=max(cache.lengths), softmax_scale=dim**-0.5, window_size=(-1, -1), block_table=table,
            softcap=0.0, sinks=None, alibi_slopes=None, use_alibi_sqrt=False, qq_bias=None, output_scale=None,
            mm_prefix_range=None, k_scale_cache=key_scale, v_scale_cache=value_scale,
            seq_threshold_3D=LARGEST_SPLIT_BATCH // heads, num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=buffers[count][0], softmax_segm_max=buffers[count][1],
            softmax_segm_expsum=buffers[count][2],
        )  # fmt: skip
        return out.unsqueeze(2)

    return attend
