"""Which implementation an operator uses, and why: chosen from the device, the format and the arithmetic asked for."""

import warnings
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch

from turboattention.config import AttentionConfig, TensorFormat
from turboattention.cpu.library import instruction_set, without_library
from turboattention.errors import UnsupportedError
from turboattention.quant.granularity import PerChannel, PerToken
from turboattention.quant.layout import PageLayout

Implementation = Literal["reference", "triton", "gluon", "cpu"]
PLAIN = AttentionConfig()
OLDEST_NVIDIA = (8, 0)  # Triton 3.3 and later make no matrix instructions for older GPUs
GLUON_HEAD_DIMS = (64, 128, 256)
GLUON_BITS = (8, 4, 2)


class Choice(NamedTuple):
    """An implementation and the reason for it; where it is the reference, why no kernel fits."""

    implementation: Implementation
    reason: str


@lru_cache(maxsize=64)
def without_triton(device: torch.device) -> str | None:
    """None where Triton kernels run on ``device``, else why not."""
    if device.type != "cuda":
        return f"tensors on {device.type}: the kernels are for CUDA and ROCm"
    if find_spec("triton") is None:
        return "Triton is not installed; run pip install 'turboattention[triton]'"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_NVIDIA:
        return f"{torch.cuda.get_device_name(device)}: Triton's matrix instructions begin with sm_80"
    return None


def without_cpu(device: torch.device) -> str | None:
    """None where the C++ kernels run on ``device``, else why not."""
    return f"tensors on {device.type}, not on the CPU" if device.type != "cpu" else without_library()


def without_portable(layout: PageLayout) -> str | None:
    """None where the portable and the CPU kernels read pages of ``layout``, else why not."""
    for side, fmt, granularity in (("K", layout.key, PerChannel), ("V", layout.value, PerToken)):
        if reason := _unsupported(fmt, granularity):
            return f"{side}: {reason}"
    if layout.page_size < 64:
        return f"pages of {layout.page_size} tokens, the kernels read 64 or 128"
    return "K: rotated" if layout.key.rotated else None


def _unsupported(fmt: TensorFormat, granularity: type) -> str | None:
    if fmt.bits == 16:
        return "stored in 16 bits"
    if fmt.metadata != "two_level":
        return f"metadata {fmt.metadata}, the kernels read two_level"
    if not isinstance(fmt.granularity, granularity):
        return f"scales {type(fmt.granularity).__name__}, the kernels read {granularity.__name__}"
    return None


def without_gluon(layout: PageLayout) -> str | None:
    """None where the Gluon decode kernel reads pages of ``layout`` (which the portable one reads), else why not."""
    if layout.page_size != 64:
        return f"pages of {layout.page_size} tokens, not 64"
    if layout.head_dim not in GLUON_HEAD_DIMS:
        return f"head_dim {layout.head_dim} is not one of {GLUON_HEAD_DIMS}"
    if layout.key.bits not in GLUON_BITS or layout.value.bits not in GLUON_BITS:
        return "3-bit codes"
    if layout.key.symmetric or not layout.value.symmetric:
        return "made for asymmetric K and symmetric V"
    refined = layout.key.refined_channels(layout.head_dim)
    if refined > 64 or layout.key.refined_bits == 4:
        return "more refined channels than 64, or 4 more bits"
    return None


def choose(
    layouts: tuple[PageLayout, ...],
    device: torch.device,
    dtype: torch.dtype,
    *,
    queries: int = 1,
    config: AttentionConfig = PLAIN,
    wanted: Implementation | None = None,
) -> Choice:
    """The implementation of attention over pages of ``layouts`` for queries of ``dtype``.

    wanted: insist on one; raises UnsupportedError with the reason where it can't be had. ``triton`` also runs on CPU
    tensors under Triton's interpreter, as the tests do.
    """
    on_cpu = wanted == "cpu" or (wanted is None and device.type == "cpu")
    missing = without_cpu(device) if on_cpu else without_triton(device)
    if wanted == "triton" and device.type == "cpu":
        missing = None
    reason = missing or _not_computed(config, dtype) or next(filter(None, map(without_portable, layouts)), None)
    if not layouts:
        reason = reason or "nothing is compressed yet"
    if wanted == "reference":
        return Choice("reference", "asked for")
    if reason is not None:
        if wanted is not None:
            raise UnsupportedError(f"implementation {wanted!r}: {reason}")
        return Choice("reference", reason)
    if on_cpu:
        return Choice("cpu", "asked for" if wanted else f"C++ kernels, {instruction_set()}")
    no_gluon = _no_gluon(layouts, device, queries)
    if wanted == "gluon" and no_gluon is not None:
        raise UnsupportedError(f"implementation 'gluon': {no_gluon}")
    if wanted == "triton" or no_gluon is not None:
        return Choice(
            "triton", "asked for" if wanted else f"portable Triton kernel, because Gluon's is not: {no_gluon}"
        )
    return Choice("gluon", "Gluon kernel for NVIDIA GPUs from sm_80 on")


@lru_cache(maxsize=64)
def say_slower(reason: str) -> None:
    """Warn, once for each reason, that a GPU computes by the PyTorch definition."""
    warnings.warn(f"attention over compressed pages runs in PyTorch, which is slower: {reason}", stacklevel=4)


def _not_computed(config: AttentionConfig, dtype: torch.dtype) -> str | None:
    if not config.plain:
        return config.described
    return "float64 queries" if dtype == torch.float64 else None


def _no_gluon(layouts: tuple[PageLayout, ...], device: torch.device, queries: int) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return "for NVIDIA GPUs"
    if queries > 1:
        return "for one query at a time"
    if find_spec("triton.experimental.gluon") is None:
        return "this Triton has no Gluon"
    return next(filter(None, map(without_gluon, layouts)), None)


def code_path(device: torch.device) -> str:
    """How the portable kernel reads codes on ``device`` (see `decode.tiles.PortableTile`).

    AMD's matrix units before gfx942 flush float16 subnormals to zero, so codes are converted there.
    """
    if device.type == "cpu":
        return "words"
    return "asm" if torch.version.hip is None else "bytes"
