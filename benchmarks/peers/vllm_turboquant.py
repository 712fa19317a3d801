"""vLLM's ``turboquant_4bit_nc``: rotated keys on a Lloyd-Max grid, 4-bit values, a slot for each token and head."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peers.paging import paged_slots
from peers.vllm_parts import OPS, load
from turboattention.bench.data import Cache16
from turboattention.errors import UnsupportedError
from turboattention.quant.rotation import hadamard

PAGE = 16
BITS = 4
SPLITS = 32  # vLLM's default


def prepare(cache: Cache16) -> Callable[[Tensor], Tensor]:
    """As `turboattention.bench.baselines.DecodeBaseline`."""
    dim, heads, device = cache.key.shape[-1], cache.kv_heads, cache.key.device
    if dim & (dim - 1):
        raise UnsupportedError("its rotation needs a head_dim that is a power of two")
    store: Any = load(f"{OPS}.triton_turboquant_store")
    decode: Any = load(f"{OPS}.triton_turboquant_decode")
    grid: Any = load("vllm.model_executor.layers.quantization.turboquant.centroids")
    centroids = grid.get_centroids(dim, BITS).to(device=device, dtype=torch.float32)
    ordered = centroids.sort().values
    midpoints = (ordered[1:] + ordered[:-1]) / 2
    key_bytes = math.ceil(dim * BITS / 8) + 2
    slot_bytes = key_bytes + math.ceil(dim * BITS / 8) + 4
    rotation = hadamard(dim, device=device)
    key, value, slots, table, lengths = paged_slots(cache, PAGE)
    pages = int(table.max()) + 1
    stored = torch.zeros(pages, PAGE, heads, slot_bytes + slot_bytes % 2, dtype=torch.uint8, device=device)
    store.triton_turboquant_store(
        key, value, stored, slots.to(torch.int32), rotation, midpoints, mse_bits=BITS, key_packed_size=key_bytes,
        value_quant_bits=BITS,
    )  # fmt: skip
    del key, value

    def attend(q: Tensor) -> Tensor:
        out: Tensor = decode.triton_turboquant_decode_attention(
            q.squeeze(2).contiguous(), stored, table, lengths, rotation, centroids, dim**-0.5, mse_bits=BITS,
            key_packed_size=key_bytes, value_quant_bits=BITS, norm_correction=True, PiT=rotation,
            max_num_kv_splits=SPLITS,
        )  # fmt: skip
        return out.unsqueeze(2)

    return attend
