"""A decode operator made of the definition in float64, so that the benchmark is judged apart from any kernel."""

from collections.abc import Callable

import torch
from torch import Tensor

from turboattention.bench.data import expand_sequence
from turboattention.bench.errors import attention64
from turboattention.ops.common.paged_kv import PagedKV


def exact_decode(kv: PagedKV, implementation: str | None = None) -> Callable[[Tensor], Tensor]:
    """As `adapters.decode`."""

    def attend(q: Tensor) -> Tensor:
        out = torch.full_like(q, torch.nan)
        ratio = q.shape[1] // kv.num_kv_heads
        for sequence in range(q.shape[0]):
            for head in range(kv.num_kv_heads):
                key, value = expand_sequence(kv, sequence, head)
                rows = slice(head * ratio, (head + 1) * ratio)
                out[sequence, rows, 0] = attention64(q[sequence, rows, 0], key, value).to(q.dtype)
        return out

    return attend
