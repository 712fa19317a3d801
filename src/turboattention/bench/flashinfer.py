"""FlashInfer as a 16-bit baseline, where it is installed; it compiles its kernels with nvcc at their first use."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from turboattention.bench.data import Cache16
from turboattention.errors import UnsupportedError

WORKSPACE = 128 << 20  # bytes, as its documentation advises


def _library() -> Any:
    if find_spec("flashinfer") is None:
        raise UnsupportedError("flashinfer is not installed")
    import flashinfer  # type: ignore[import-not-found,unused-ignore] # optional

    return flashinfer


def decode_with(page_size: int) -> Callable[[Cache16], Callable[[Tensor], Tensor]]:
    """Decode over pages of ``page_size`` tokens, planned once for the lengths of a cache."""

    def prepare(cache: Cache16) -> Callable[[Tensor], Tensor]:
        library = _library()
        key, value, tables = _paged(cache, page_size)
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=key.device)
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        planned: set[int] = set()

        def attend(q: Tensor) -> Tensor:
            if q.shape[1] not in planned:
                wrapper.plan(
                    *tables, q.shape[1], cache.kv_heads, q.shape[-1], page_size, q_data_type=q.dtype,
                    kv_data_type=key.dtype,
                )  # fmt: skip
                planned.add(q.shape[1])
            out: Tensor = wrapper.run(q.squeeze(2), (key, value))
            return out.unsqueeze(2)

        return attend

    return prepare


def prefill(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    """One sequence; ``[1, heads, tokens, head_dim]``."""
    library = _library()
    if q.shape[0] != 1:
        raise UnsupportedError("FlashInfer's single prefill takes one sequence")
    rows, keys, values = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))

    def call() -> Tensor:
        out: Tensor = library.single_prefill_with_kv_cache(rows, keys, values, causal=causal)
        return out.transpose(0, 1)[None]

    return call


def _paged(cache: Cache16, size: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """K and V ``[pages, kv_heads, size, head_dim]``; first page of each sequence, page ids, tokens of the last page."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    counts = [-(-length // size) for length in cache.lengths]
    for (key, value), count in zip(cache.sequences(), counts, strict=True):
        for part, x in zip(parts, (key, value), strict=True):
            padded = torch.nn.functional.pad(x, (0, 0, 0, count * size - x.shape[1]))
            part.append(padded.unflatten(1, (count, size)).transpose(0, 1))
    device = cache.key.device
    first = torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32, device=device)
    ids = torch.arange(sum(counts), dtype=torch.int32, device=device)
    last = torch.tensor([(length - 1) % size + 1 for length in cache.lengths], dtype=torch.int32, device=device)
    return torch.cat(parts[0]).contiguous(), torch.cat(parts[1]).contiguous(), (first, ids, last)
