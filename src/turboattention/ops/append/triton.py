"""Compression of whole pages in one launch: the kernel behind `reference.compress_pages`, with the same bytes."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboattention.checks import check_heads
from turboattention.errors import UnsupportedError, invalid
from turboattention.ops.append.page_spec import page_spec, supports
from turboattention.ops.append.triton_page import encode_key, encode_value, key_channels, stored_tokens
from turboattention.quant.layout import PageLayout

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def compress_pages(
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    query_power: Tensor | None = None,
    *,
    fault: Tensor | None = None,
) -> Tensor:
    """Compress the tokens of whole pages; bytes as `reference.compress_pages`.

    key, value: float16, bfloat16 or float32 ``[batch, heads, pages * page_size, head_dim]``, any strides. valid: bool
    ``[batch or 1, tokens]``; the others widen no range. query_power: float32 ``[batch, heads, head_dim]``.
    fault: int32 ``[batch]``, to which each row adds (bitwise or) 1 for NaN or Inf and 2 for a range beyond float16; the
    pages of such a row are unusable. Without it the call waits for the device and raises InvalidInputError, as the
    definition does; with it nothing waits.
    Returns uint8 ``[batch, heads, pages, layout.nbytes]``. Raises UnsupportedError for what `supports` refuses.
    """
    if reason := supports(layout):
        raise UnsupportedError(reason)
    _check(layout, key, value, valid, query_power, fault)
    batch, heads, tokens, _ = key.shape
    count = tokens // layout.page_size
    pages = torch.empty(batch, heads, count, layout.nbytes, dtype=torch.uint8, device=key.device)
    seen = torch.zeros(batch, dtype=torch.int32, device=key.device) if fault is None else fault
    if pages.numel():
        spec = page_spec(layout)
        mask = None if valid is None else valid.view(torch.uint8).expand(batch, -1)
        power = query_power.contiguous() if query_power is not None and spec.refined else None
        compress_kernel[(count, heads, batch)](
            key, value, mask, power, pages, seen,
            *key.stride(), *value.stride(), *((0, 0) if mask is None else mask.stride()),
            S=spec, num_warps=spec.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    if fault is None and int(seen.max() if batch else 0):
        raise invalid(
            "key or value",
            "finite values and ranges up to 65504",
            f"others in rows {seen.nonzero().flatten().tolist()}",
            "use preset 'fp16' for this model",
        )
    return pages


def _check(
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    query_power: Tensor | None,
    fault: Tensor | None,
) -> None:
    check_heads("key", key, head_dim=layout.head_dim)
    if value.shape != key.shape or value.dtype != key.dtype:
        raise invalid("value", f"the shape and dtype of key {tuple(key.shape)} {key.dtype}", tuple(value.shape))
    if key.dtype not in DTYPES:
        raise invalid("key", "dtype float16, bfloat16 or float32", key.dtype)
    batch, heads, tokens, dim = key.shape
    if tokens % layout.page_size:
        raise invalid("key", f"a multiple of {layout.page_size} tokens", tokens)
    if valid is not None and (valid.dtype != torch.bool or valid.shape not in ((1, tokens), (batch, tokens))):
        raise invalid("valid", f"bool [{batch} or 1, {tokens}]", f"{valid.dtype} {tuple(valid.shape)}")
    power_shape = (batch, heads, dim)
    if query_power is not None and (query_power.dtype != torch.float32 or query_power.shape != power_shape):
        raise invalid("query_power", f"float32 {list(power_shape)}", f"{query_power.dtype} {tuple(query_power.shape)}")
    if fault is not None and (fault.dtype != torch.int32 or fault.shape != (batch,)):
        raise invalid("fault", f"int32 [{batch}]", f"{fault.dtype} {tuple(fault.shape)}")


@triton.jit
def compress_kernel(
    key, value, valid, power, pages, fault,
    key_b, key_h, key_t, key_d, value_b, value_h, value_t, value_d, valid_b, valid_t,
    S: tl.constexpr,
):  # fmt: skip
    """One program for each page ``(page, head, row)``; see `compress_pages`."""
    index = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    TOKENS: tl.constexpr = S.page_size
    page = pages + ((row * tl.num_programs(1) + head) * tl.num_programs(0) + index) * S.nbytes
    key += row * key_b + head * key_h + index * TOKENS * key_t
    value += row * value_b + head * value_h + index * TOKENS * value_t

    token = tl.arange(0, TOKENS)
    channel, live = key_channels(S)
    x = tl.load(key + token[:, None] * key_t + channel[None, :] * key_d, live[None, :], 0.0).to(tl.float32)
    weight = 1.0
    if power is not None:
        weight = tl.load(power + (row * tl.num_programs(1) + head) * S.head_dim + channel, live, 0.0)
    real = token >= 0
    if valid is not None:
        real = tl.load(valid + row * valid_b + (index * TOKENS + token) * valid_t) != 0
    seen = encode_key(x, real, weight, page, S)

    token = stored_tokens(S)
    channel = tl.arange(0, S.value_width)
    live = channel < S.head_dim
    x = tl.load(value + token[:, None] * value_t + channel[None, :] * value_d, live[None, :], 0.0).to(tl.float32)
    real = token >= 0
    if valid is not None:
        real = tl.load(valid + row * valid_b + (index * TOKENS + token) * valid_t) != 0
    seen |= encode_value(x, real, page, S)
    if seen != 0:
        tl.atomic_or(fault + row, seen)
