"""Checks of tensors given by the user: one wording for all messages."""

import torch
from torch import Tensor

from turboattention.errors import invalid

SUPPORTED_HEAD_DIMS = (64, 80, 96, 128, 256)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_head_dim(head_dim: int) -> None:
    """Raise unless a kernel and a page layout exist for ``head_dim``."""
    if head_dim not in SUPPORTED_HEAD_DIMS:
        known = ", ".join(map(str, SUPPORTED_HEAD_DIMS))
        raise invalid("head_dim", f"one of {known}", head_dim, "use preset 'fp16' for this model")


def check_heads(name: str, x: Tensor, *, head_dim: int | None = None, heads: int | None = None) -> None:
    """Raise unless ``x`` is a floating-point tensor ``[batch, heads, tokens, head_dim]``."""
    if x.dim() != 4:
        raise invalid(name, "4 dimensions [batch, heads, tokens, head_dim]", f"shape {tuple(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise invalid(name, "dtype float16, bfloat16, float32 or float64", x.dtype)
    if head_dim is not None and x.shape[-1] != head_dim:
        raise invalid(name, f"head_dim {head_dim}", f"shape {tuple(x.shape)}")
    if heads is not None and x.shape[1] != heads:
        raise invalid(name, f"{heads} heads", f"shape {tuple(x.shape)}")


def to_float16(name: str, x: Tensor) -> Tensor:
    """``x`` in float16; raises when that overflows, which would turn a page into NaN without a sign."""
    stored = x.to(torch.float16)
    if not bool(torch.isfinite(stored).all()):
        raise invalid(
            name, "magnitudes up to 65504", f"{float(x.float().abs().max()):.4g}", "use preset 'fp16' for this model"
        )
    return stored


def check_finite(name: str, x: Tensor) -> None:
    """Raise when ``x`` holds NaN or infinity: a cache that is silently wrong is the worst failure."""
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        first = tuple((~finite).nonzero()[0].tolist())
        raise invalid(
            name,
            "finite values",
            f"{int((~finite).sum())} NaN or Inf, the first at index {first}",
            "check the model's weights and its dtype (float16 overflows at 65504)",
        )
