"""The definition of a paged append: one step of a batch of sequences of any lengths, in plain PyTorch.

A step compresses the pages that are final and puts the new tokens into the tail. ``before``: what was there before
the step is final (decode, where the newest tokens may still be taken back), so the new tokens stay exact. ``after``:
the new tokens are final as well (a prefill chunk), all but the ``window`` newest.
"""

from typing import Literal

import torch
from torch import Tensor

from turboattention.checks import check_heads
from turboattention.config import check_choice
from turboattention.errors import InvalidInputError, invalid
from turboattention.ops.append.packed import Packed
from turboattention.ops.append.reference import add_query_power
from turboattention.ops.common.paged_kv import PagedGroup, PagedKV, appending_to_own_rows
from turboattention.quant.codec import encode_pages

When = Literal["before", "after"]
# Bits of the fault word of a row; its tokens are unusable then.
NOT_FINITE = 1  # NaN or Inf among the tokens, or a value beyond the dtype of the tail
BEYOND_FLOAT16 = 2  # a scale or zero of a page beyond 65504
NO_ROOM = 4  # a page that the table or the pool has no place for


def tail_capacity(page_size: int, window: int, new_tokens: int, when: When) -> int:
    """Slots of the tail that are enough for every step of at most ``new_tokens`` tokens."""
    return window + page_size - 1 + (new_tokens if when == "before" else 0)


def append_paged(
    kv: PagedKV,
    key: Tensor,
    value: Tensor,
    *,
    when: When,
    fault: Tensor,
    window: int = 0,
    counts: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    query_power: Tensor | None = None,
    queries: Tensor | None = None,
    packed: Packed | None = None,
) -> None:
    """Append the new tokens of each sequence: full pages into the pools, the others into the tail.

    kv: the cache before the step; its ``lengths`` and ``page_tokens`` are only read, `advance` gives the new ones.
        Row b holds ``lengths[b]`` tokens (0 for a new sequence) and gets tokens ``lengths[b] ..``.
    key, value: ``[batch, kv_heads, n, head_dim]``, rounded to the dtype of the tail before anything else.
    when: ``before`` compresses the pages of tokens before ``lengths[b] - window``, ``after`` those before
        ``lengths[b] + n - window``.
    fault: int32 ``[batch]``, gets NOT_FINITE, BEYOND_FLOAT16 and NO_ROOM (bitwise or).
    counts: int32 ``[batch]``, the first so many new tokens of each row are real; None: all n.
    rope: cos and sin ``[batch or 1, n, head_dim / 2 or head_dim]`` when ``key`` is before RoPE; the halves of a head
        are rotated against each other, in float32.
    query_power: float32 ``[rows of the tail, kv_heads, head_dim]``, see `encode_pages`.
    queries: ``[batch, heads, head_dim]`` of a step of one new token, whose squares are first added to query_power where
        the token is real.
    packed: where the ``counts`` new tokens of each sequence are when key and value hold all of them one after the
        other, ``[1, kv_heads, tokens, head_dim]``; without rope and queries.
    """
    check_step(
        kv, key, value, when=when, fault=fault, window=window, counts=counts, rope=rope, query_power=query_power,
        queries=queries, packed=packed,
    )  # fmt: skip
    if queries is not None and query_power is not None:
        add_step_queries(query_power, queries, kv.tail_rows, counts)
    if kv.tail_rows is not None or kv.sink_rows is not None:
        with appending_to_own_rows(kv, query_power) as (own, power):
            append_paged(
                own, key, value, when=when, fault=fault, window=window, counts=counts, rope=rope, query_power=power,
                packed=packed,
            )  # fmt: skip
        return
    stored = kv.tail_key.dtype
    key = key.to(stored) if rope is None else rotate_positions(key, *rope).to(stored)
    value = value.to(stored)
    size, capacity = kv.groups[0].layout.page_size, kv.tail_key.shape[2]
    sinks = 0 if kv.sink_key is None else kv.sink_key.shape[2]
    # Pages are written at once, because nothing reads them yet; exact tokens, which the step reads, when all that needs
    # memory is done: a step that fails can be taken again.
    found: list[int] = fault.tolist()
    exact: list[tuple[Tensor, Tensor, Tensor]] = []
    for row, (length, paged) in enumerate(zip(kv.lengths.tolist(), kv.page_tokens.tolist(), strict=True)):
        start, most = (0, key.shape[2]) if packed is None else (int(packed.starts[row]), packed.longest)
        count = most if counts is None else min(int(counts[row]), most)
        end = length + count
        stop = max(0, (length if when == "before" else end) - window) // size
        new_key, new_value = (x[row if packed is None else 0, :, start : start + count] for x in (key, value))
        if not bool(new_key.isfinite().all() and new_value.isfinite().all()):
            found[row] |= NOT_FINITE
        for page in range(paged // size, stop):
            columns = torch.arange(page * size, (page + 1) * size, device=key.device)
            old, fresh = columns[columns < length] % capacity, columns[columns >= length] - length
            tokens = [
                torch.cat([tail[row][:, old], new[:, fresh]], 1)
                for tail, new in ((kv.tail_key, new_key), (kv.tail_value, new_value))
            ]
            power = None if query_power is None else query_power[row]
            for group in kv.groups:
                found[row] |= _store_page(group, row, page, tokens[0], tokens[1], columns >= sinks, power)
        columns = torch.arange(max(length, paged, stop * size), end, device=key.device)
        for tail, sink, new in ((kv.tail_key, kv.sink_key, new_key), (kv.tail_value, kv.sink_value, new_value)):
            exact.append((tail[row], columns % capacity, new[:, columns - length]))
            if sink is not None and length < sinks:
                first = torch.arange(length, min(end, sinks), device=key.device)
                exact.append((sink[row], first, new[:, first - length]))
    bits = torch.tensor(found, dtype=fault.dtype, device=fault.device)
    for part, slots, new in exact:
        part[:, slots] = new
    fault.copy_(bits)


def _store_page(
    group: PagedGroup, row: int, page: int, key: Tensor, value: Tensor, valid: Tensor, power: Tensor | None
) -> int:
    """Encode tokens ``[kv_heads, page_size, head_dim]`` of one page into the pool; returns the fault bits."""
    heads = list(group.heads)
    if not bool(key[heads].isfinite().all() and value[heads].isfinite().all()):
        return NOT_FINITE
    places = group.table[row, :, page].tolist() if page < group.table.shape[-1] else [-1]
    if not all(0 <= place < group.pool.shape[0] for place in places):
        return NO_ROOM
    try:
        pages = encode_pages(
            group.layout,
            key[heads],
            value[heads],
            valid.expand(len(heads), -1),
            query_power=None if power is None else power[heads],
        )
    except InvalidInputError:
        return BEYOND_FLOAT16
    group.pool[places] = pages
    return 0


def add_step_queries(power: Tensor, queries: Tensor, rows: Tensor | None, counts: Tensor | None) -> None:
    """Add one query of each sequence to its statistics; arguments as `append_paged`, rows those of the tail."""
    real = None if counts is None else (counts > 0)[:, None]
    squares = add_query_power(None, queries.unsqueeze(2), power.shape[1], real)
    power.index_add_(0, torch.arange(len(power), device=power.device) if rows is None else rows, squares)


def rotate_positions(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over the halves of a head, float32 ``[batch, heads, n, head_dim]``; cos and sin as in `append_paged`."""
    x, half = key.float(), key.shape[-1] // 2
    if cos.shape[-1] == half:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos.float()[:, None] + turned * sin.float()[:, None]


def advance(
    lengths: Tensor,
    page_tokens: Tensor,
    new_tokens: int,
    *,
    when: When,
    page_size: int,
    window: int = 0,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lengths and page tokens after a step, out of place: all layers of a model read the old ones.

    Arguments as `append_paged`. Returns two int32 ``[batch]`` on the device; nothing waits for it. Attention of the
    step reads the new ones; copy them over the old ones after the last layer.
    """
    check_choice("when", when, ("before", "after"))
    longer = lengths + (new_tokens if counts is None else counts.clamp(max=new_tokens))
    limit = ((lengths if when == "before" else longer) - window).clamp(min=0)
    return longer, torch.maximum(page_tokens, limit - limit % page_size)


def check_step(
    kv: PagedKV,
    key: Tensor,
    value: Tensor,
    *,
    when: When,
    fault: Tensor,
    window: int,
    counts: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    query_power: Tensor | None,
    queries: Tensor | None = None,
    packed: Packed | None = None,
) -> None:
    """Raise InvalidInputError for shapes and dtypes that do not fit; reads nothing from the device."""
    check_choice("when", when, ("before", "after"))
    rows, heads, capacity, dim = kv.tail_key.shape
    batch = rows if kv.tail_rows is None else kv.lengths.shape[0]
    check_heads("key", key, heads=heads, head_dim=dim)
    entries, n = (batch, key.shape[2]) if packed is None else (1, min(packed.longest, key.shape[2]))
    if key.shape[0] != entries or n < 1:
        raise invalid("key", f"batch {entries} and at least 1 token", f"shape {tuple(key.shape)}")
    if packed is not None and (counts is None or rope is not None or queries is not None):
        raise invalid("packed", "with counts, without rope and queries", "another call")
    if value.shape != key.shape:
        raise invalid("value", f"the shape of key {tuple(key.shape)}", tuple(value.shape))
    sizes = {group.layout.page_size for group in kv.groups}
    if len(sizes) != 1:
        raise invalid("groups", "one page size", sorted(sizes))
    needed = tail_capacity(sizes.pop(), window, n, when)
    if window < 0 or capacity < needed:
        raise invalid("tail", f"a window of 0 or more and a capacity of {needed} tokens", f"{window} and {capacity}")
    for name, x, shape, dtype in (
        ("lengths", kv.lengths, (batch,), torch.int32),
        ("page_tokens", kv.page_tokens, (batch,), torch.int32),
        ("fault", fault, (batch,), torch.int32),
        ("counts", counts, (batch,), torch.int32),
        ("starts", None if packed is None else packed.starts, (batch,), torch.int32),
        ("query_power", query_power, (rows, heads, dim), torch.float32),
        ("tail_rows", kv.tail_rows, (batch,), torch.int32),
        ("sink_rows", kv.sink_rows, (batch,), torch.int32),
    ):
        if x is not None and (x.shape != shape or x.dtype != dtype or not x.is_contiguous()):
            raise invalid(name, f"contiguous {dtype} {list(shape)}", f"{x.dtype} {tuple(x.shape)}")
    if queries is not None and (
        n != 1 or queries.dim() != 3 or len(queries) != batch or queries.shape[1] % heads or queries.shape[2] != dim
    ):
        expected = f"[{batch}, a multiple of {heads}, {dim}] for steps of 1 token"
        raise invalid("queries", expected, f"shape {tuple(queries.shape)} and {n} tokens")
    if rope is not None:
        cos, sin = rope
        fits = cos.dim() == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == n and cos.shape[2] in (dim, dim // 2)
        if not fits or sin.shape != cos.shape:
            expected = f"cos and sin [{batch} or 1, {n}, {dim // 2} or {dim}]"
            raise invalid("rope", expected, f"{tuple(cos.shape)} and {tuple(sin.shape)}")
