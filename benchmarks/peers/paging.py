"""A 16-bit cache as the token list, slots and page table that vLLM's kernels take; pages in random order."""

import torch
from torch import Tensor

from turboattention.bench.data import Cache16, generator_on


def paged_slots(cache: Cache16, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """K and V ``[tokens, kv_heads, head_dim]``, the slot of each token, the page table and the lengths.

    Slots are int64 ``[tokens]`` (page x size + place in it), the table int32 ``[batch, pages]``, lengths int32.
    """
    device = cache.key.device
    counts = [-(-length // size) for length in cache.lengths]
    order = torch.randperm(sum(counts), device=device, generator=generator_on(device, 2))
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=device)
    slots, keys, values = [], [], []
    first = 0
    for row, ((key, value), count) in enumerate(zip(cache.sequences(), counts, strict=True)):
        pages = order[first : first + count]
        table[row, :count] = pages
        token = torch.arange(key.shape[1], device=device)
        slots.append(pages[token // size] * size + token % size)
        keys.append(key.transpose(0, 1))
        values.append(value.transpose(0, 1))
        first += count
    lengths = torch.tensor(cache.lengths, dtype=torch.int32, device=device)
    return torch.cat(keys), torch.cat(values), torch.cat(slots), table, lengths
