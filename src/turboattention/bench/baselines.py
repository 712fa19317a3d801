"""16-bit attention to compare with: PyTorch's for every backend that runs, FlashInfer, and our own Triton kernel.

A baseline turns a cache (or a chunk) into a call. It raises UnsupportedError with its reason where it can't run.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from turboattention.bench.data import Cache16
from turboattention.errors import UnsupportedError

Attend = Callable[[Tensor], Tensor]  # q [batch, heads, 1, head_dim] -> the same shape
Chunk = Callable[[Tensor, Tensor, Tensor, bool], Callable[[], Tensor]]  # (q, k, v, causal) -> a call

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # not "math", which writes all scores to memory and is never the fastest


@dataclass(frozen=True)
class DecodeBaseline:
    """name: for tables. prepare: from a 16-bit cache to a call on queries. exact: more than 16 bits.

    quantised: a peer that stores fewer bits: its error against 16-bit values is that of its codes.
    """

    name: str
    prepare: Callable[[Cache16], Attend]
    exact: bool = False
    quantised: bool = False


@dataclass(frozen=True)
class PrefillBaseline:
    """name: for tables. prepare: from q, k, v ``[batch, heads, tokens, head_dim]`` and ``causal`` to a call."""

    name: str
    prepare: Chunk
    quantised: bool = False


def decode_baselines(device: torch.device) -> list[DecodeBaseline]:
    """Everything that may run decode on ``device``; the exact types of a CPU included."""
    if device.type != "cuda":
        return [
            DecodeBaseline("SDPA bfloat16", _sdpa_decode(None, False)),
            DecodeBaseline("SDPA float32", _sdpa_decode(None, False, torch.float32), exact=True),
            # The query heads of a KV head as rows of one head, which reads K and V once for all of them.
            DecodeBaseline("SDPA bfloat16, heads as rows", _sdpa_decode(None, True)),
            DecodeBaseline("SDPA float32, heads as rows", _sdpa_decode(None, True, torch.float32), exact=True),
            DecodeBaseline("SDPA bfloat16, one sequence after the other", _sdpa_in_turn),
        ]
    found = []
    for name, backend in BACKENDS.items():
        found.append(DecodeBaseline(f"SDPA {name}", _sdpa_decode(backend, False)))
        # The query heads of a KV head as rows of one head: no mask is needed, and some backends do it faster.
        found.append(DecodeBaseline(f"SDPA {name}, heads as rows", _sdpa_decode(backend, True)))
    if find_spec("triton") is not None:
        from turboattention.bench.sixteen_bit import TILES, SplitDecode

        for tiles in TILES:
            found.append(DecodeBaseline(f"Triton 16-bit ({tiles.name})", partial(SplitDecode, tiles=tiles)))
    from turboattention.bench.flashinfer import decode_with

    for size in (16, 64):
        found.append(DecodeBaseline(f"FlashInfer, pages of {size}", decode_with(size)))
    return found


def prefill_baselines(device: torch.device) -> list[PrefillBaseline]:
    """Everything that may run prefill on ``device``."""
    if device.type != "cuda":
        return [
            PrefillBaseline("SDPA bfloat16", _sdpa_prefill(None, repeat=False)),
            PrefillBaseline("SDPA float32", _sdpa_prefill(None, repeat=False, dtype=torch.float32)),
            PrefillBaseline("SDPA bfloat16, K and V repeated before", _sdpa_prefill(None, repeat=True)),
            PrefillBaseline(
                "SDPA float32, K and V repeated before", _sdpa_prefill(None, repeat=True, dtype=torch.float32)
            ),
        ]
    found = []
    for name, backend in BACKENDS.items():
        found.append(PrefillBaseline(f"SDPA {name}", _sdpa_prefill(backend, repeat=False)))
        found.append(PrefillBaseline(f"SDPA {name}, K and V repeated before", _sdpa_prefill(backend, repeat=True)))
    from turboattention.bench.flashinfer import prefill

    found.append(PrefillBaseline("FlashInfer", prefill))
    return found


def _sdpa_decode(
    backend: SDPBackend | None, rows: bool, dtype: torch.dtype | None = None
) -> Callable[[Cache16], Attend]:
    def prepare(cache: Cache16) -> Attend:
        key, value = cache.dense()
        key, value = (key, value) if dtype is None else (key.to(dtype), value.to(dtype))

        def attend(q: Tensor) -> Tensor:
            x = q.to(key.dtype)
            x = x.view(x.shape[0], cache.kv_heads, -1, x.shape[-1]) if rows else x
            with only(backend):
                out = scaled_dot_product_attention(x, key, value, enable_gqa=x.shape[1] != cache.kv_heads)
            return out.reshape(q.shape)

        return attend

    return prepare


def _sdpa_in_turn(cache: Cache16) -> Attend:
    """For unequal lengths; without a launch to pay for, a CPU loses little by it."""
    sequences = cache.sequences()

    def attend(q: Tensor) -> Tensor:
        outs = [
            scaled_dot_product_attention(row[None], key[None], value[None], enable_gqa=row.shape[0] != cache.kv_heads)
            for row, (key, value) in zip(q, sequences, strict=True)
        ]
        return torch.cat(outs)

    return attend


def _sdpa_prefill(backend: SDPBackend | None, *, repeat: bool, dtype: torch.dtype | None = None) -> Chunk:
    def prepare(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
        ratio = q.shape[1] // k.shape[1]
        if repeat and ratio == 1:
            raise UnsupportedError("nothing to repeat: as many KV heads as query heads")
        k, v = (x.repeat_interleave(ratio, 1) for x in (k, v)) if repeat else (k, v)
        q, k, v = (x if dtype is None else x.to(dtype) for x in (q, k, v))

        def call() -> Tensor:
            with only(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=ratio > 1 and not repeat)

        return call

    return prepare


@contextmanager
def only(backend: SDPBackend | None) -> Iterator[None]:
    """Allow one backend; what it can't do raises RuntimeError, whose reasons PyTorch sends as warnings."""
    if backend is None:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sdpa_kernel(backend):
            yield
