"""The only module here that calls our operators: a changed signature changes this file."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from turboattention.bench.case import Case
from turboattention.kvcache.paged import PagedCache
from turboattention.ops import dispatch
from turboattention.ops.append import advance, append_implementation, paged_append_for
from turboattention.ops.common.paged_kv import PagedKV
from turboattention.ops.prefill.int8_prefill import Implementation, choose
from turboattention.quant.codec import encode_pages
from turboattention.quant.layout import PageLayout


def implementation_of(case: Case, device: torch.device) -> str:
    """The implementation of append or decode that runs: the asked one, or what the operator chooses."""
    if case.implementation is not None:
        return case.implementation
    layout = PageLayout(case.config.page_size, case.head_dim, case.config.key, case.config.value)
    if case.op == "append":
        return append_implementation([layout], device)
    return dispatch.choose((layout,), device, torch.float16).implementation


def decode(kv: PagedKV, implementation: str | None) -> Callable[[Tensor], Tensor]:
    """A call on queries ``[batch, heads, 1, head_dim]`` over a paged cache."""
    from turboattention.ops.decode import paged_decode

    def attend(q: Tensor) -> Tensor:
        out: Tensor = paged_decode(q, kv, implementation=cast(dispatch.Implementation | None, implementation)).out
        return out

    return attend


def prefill_implementation(q: Tensor, asked: str | None) -> str:
    """The implementation of INT8 prefill that runs on ``q``."""
    return asked or choose(q, None)


def int8_prefill(q: Tensor, k: Tensor, v: Tensor, causal: bool, implementation: str | None) -> Callable[[], Tensor]:
    """A call of INT8 attention of a chunk ``[batch, heads, tokens, head_dim]`` over itself, quantisation included."""
    from turboattention.ops.prefill.int8_prefill import int8_prefill as operator

    def call() -> Tensor:
        return operator(q, k, v, causal=causal, implementation=cast(Implementation | None, implementation)).out

    return call


def int8_prepass(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object] | None:
    """A call of the part of `int8_prefill` that quantises; None on a CPU, where it has no call of its own."""
    if not q.is_cuda:
        return None
    from turboattention.ops.prefill.int8_prefill import choose
    from turboattention.ops.prefill.int8_prepass import quantise_chunk

    queries = choose(q, None) != "hopper"
    return lambda: quantise_chunk(q, k, v, q.shape[-1] ** -0.5, queries=queries)


def int8_values(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64 values that the INT8 operands of one sequence stand for, ``[heads, tokens, head_dim]`` each.

    q: ``[1, heads, tokens, head_dim]``, k, v with KV heads. Their products give the scores with the usual scale, up to
    a constant of each row, which softmax does not see.
    """
    from turboattention.ops.prefill.int8 import KEY_BLOCK, LOG2E, QUERY_BLOCK, code_values, quantise_chunk
    from turboattention.quant.packing import restore_tokens

    scale = q.shape[-1] ** -0.5
    chunk = quantise_chunk(q, k, v, scale)
    stored_v = restore_tokens(chunk.v).mT
    found = []
    for codes, scales, block in (
        (chunk.q, chunk.q_scale, QUERY_BLOCK),
        (chunk.k, chunk.k_scale, KEY_BLOCK),
        (stored_v, chunk.v_scale, KEY_BLOCK),
    ):
        found.append(code_values(codes, scales, block)[:, : q.shape[2], : q.shape[3]])
    return found[0] / (scale * LOG2E), found[1], found[2]


@dataclass(frozen=True)
class AppendSteps:
    """Steps of one token that fill one page of every sequence.

    calls: one for each step, in order; the compressing one is ``calls[compressing]``.
    wrong_bytes: share of the bytes of the new pages that differ from the definition's.
    """

    calls: list[Callable[[], None]]
    compressing: int
    wrong_bytes: float
    bits_per_value: float


def append_steps(case: Case, device: torch.device, dtype: torch.dtype, key: Tensor, value: Tensor) -> AppendSteps:
    """Prepare the steps before ``case.tokens`` and run them once.

    key, value: ``[batch, kv_heads, page_size, head_dim]``, a token for each step.
    """
    config, size = case.config, case.config.page_size
    start = max(size, (case.tokens - size) // size * size)
    cache = PagedCache(
        config, [(config.key, config.value)] * case.kv_heads, rows=case.batch, max_tokens=start + config.recent_window
        + 2 * size, head_dim=case.head_dim, dtype=dtype, device=device, shuffle=0 if case.order == "random" else None,
    )  # fmt: skip
    if cache.query_power is not None:
        cache.query_power.fill_(1.0)
    layout = cache.groups[0].layout
    operator = paged_append_for([layout], device)
    lengths = torch.full((case.batch,), start + 1 + config.recent_window, dtype=torch.int32, device=device)
    paged = torch.full_like(lengths, start)
    calls: list[Callable[[], None]] = []
    compressing = 0
    for step in range(size):
        kv = replace(cache.view(), lengths=lengths, page_tokens=paged)
        # The first step holds the second token of the page, the last one the first token of the next page.
        token = slice((step + 1) % size, (step + 1) % size + 1)
        calls.append(_bound(operator, kv, key[:, :, token].contiguous(), value[:, :, token].contiguous(), cache))
        lengths, later = advance(lengths, paged, 1, when="before", page_size=size, window=config.recent_window)
        compressing = step if bool((later != paged).any()) else compressing
        paged = later
    # What was there before these steps: the first token of the page, and a window that is already in the past.
    newest = torch.arange(start, start + 1 + config.recent_window, device=device)
    slots = newest % cache.tail_key.shape[2]
    for tail, x in ((cache.tail_key, key), (cache.tail_value, value)):
        tail[:, :, slots] = x[:, :, (newest - start - config.recent_window) % size].to(dtype)
    wanted_power = None if cache.query_power is None else cache.query_power
    expected = _expected_page(cache, key, value, start, wanted_power)
    for call in calls:
        call()
    cache.check()
    got = cache.groups[0].pool[cache.groups[0].table[:, :, start // size].long()]
    wrong = float((got != expected).double().mean())
    return AppendSteps(calls, compressing, wrong, layout.bits_per_value)


def _bound(
    operator: Callable[..., None], kv: PagedKV, key: Tensor, value: Tensor, cache: PagedCache
) -> Callable[[], None]:
    def call() -> None:
        operator(
            kv, key, value, when="before", fault=cache.fault, window=cache.config.recent_window,
            query_power=cache.query_power,
        )  # fmt: skip

    return call


def _expected_page(cache: PagedCache, key: Tensor, value: Tensor, start: int, power: Tensor | None) -> Tensor:
    size, window = cache.config.page_size, cache.config.recent_window
    order = (torch.arange(start, start + size, device=key.device) - start - window) % size
    pages = [x[:, :, order].to(cache.tail_key.dtype) for x in (key, value)]
    return encode_pages(cache.groups[0].layout, pages[0], pages[1], query_power=power)
