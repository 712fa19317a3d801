"""K and V as the cache would give them back: quantised by pages, from the same queries, with the sinks exact."""

from collections.abc import Iterator

import torch
from torch import Tensor

from turboattention.calibration.capture import Captured
from turboattention.calibration.levels import BASE, Tensor2, levels
from turboattention.ops.append import compress_pages, real_tokens
from turboattention.quant.codec import decode_pages
from turboattention.quant.layout import PageLayout
from turboattention.quant.rotation import rotate

PAGE = BASE.page_size


def whole_pages(captured: Captured) -> Captured:
    """A batch of one, cut to full pages."""
    tokens = captured.key.shape[2] // PAGE * PAGE
    query, key, value = (x[:1, :, :tokens] for x in (captured.query, captured.key, captured.value))
    gradient = None if captured.gradient is None else captured.gradient[:1, :, :tokens]
    return Captured(query, key, value, captured.scale, gradient)


def page_rows(captured: Captured) -> tuple[Tensor, Tensor, Tensor]:
    """K and V as rows of pages ``[pages, kv_heads, page, head_dim]`` in float16, and the queries' power of each.

    A page is compressed when its last query has been seen, with the power of all queries up to then.
    """
    kv_heads, dim = captured.key.shape[1], captured.key.shape[3]
    key, value = (x[0].half().unflatten(1, (-1, PAGE)).transpose(0, 1) for x in (captured.key, captured.value))
    squares = captured.query[0].float().square().reshape(kv_heads, -1, key.shape[0], PAGE, dim)
    power = squares.sum((1, 3)).cumsum(1).transpose(0, 1)  # [pages, kv_heads, head_dim]
    return key.contiguous(), value.contiguous(), power.contiguous()


def stored_pages(layout: PageLayout, key: Tensor, value: Tensor, power: Tensor) -> Tensor:
    """Bytes ``[pages, kv_heads, layout.nbytes]`` of what `page_rows` gave."""
    first = real_tokens(0, PAGE, None, BASE.sink_tokens, key.device)
    valid = None
    if first is not None:
        valid = torch.ones(key.shape[0], PAGE, dtype=torch.bool, device=key.device)
        valid[:1] = first
    pages = compress_pages(layout, key, value, valid, None, power if layout.key.refined_bits else None)
    return pages[:, :, 0]


def rounding_errors(captured: Captured) -> Iterator[tuple[Tensor2, str, Tensor]]:
    """For each tensor and level what the codes change: float32 ``[kv_heads, tokens, head_dim]``, zero at the sinks."""
    key, value, power = page_rows(captured)
    dim = key.shape[-1]
    # A page holds both: levels of K and of V in pairs, the last of V again beside what is left of K.
    values = list(levels("value", dim).items())
    for number, (level, fmt) in enumerate(levels("key", dim).items()):
        value_level, value_format = values[min(number, len(values) - 1)]
        layout = PageLayout(PAGE, dim, fmt, value_format)
        decoded = decode_pages(layout, stored_pages(layout, key, value, power))
        yield "key", level, _difference(decoded.key.expand(), key)
        if number < len(values):
            yield "value", value_level, _difference(rotate(decoded.value.expand()), value)


def _difference(stored: Tensor, exact: Tensor) -> Tensor:
    error = (stored - exact.float()).transpose(0, 1).flatten(1, 2)
    error[:, : BASE.sink_tokens] = 0.0
    return error
