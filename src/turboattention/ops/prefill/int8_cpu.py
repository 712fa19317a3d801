"""INT8 prefill by the C++ kernels, quantisation included."""

import torch
from torch import Tensor

from turboattention.cpu import library, structs
from turboattention.errors import invalid
from turboattention.ops.prefill.reference import AttentionOutput
from turboattention.ops.prefill.sequences import Sequences


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    isa: int | None = None,
) -> AttentionOutput:
    """`int8_prefill` on the CPU; the caller has checked the arguments, which are as there.

    isa: see `ops.decode.cpu.attend`, also for threads and bits. Raises InvalidInputError for lengths of packed
    sequences that do not lie in the tensors.
    """
    packed = sequences.is_packed
    out = torch.empty_like(q)  # with its strides
    lse = torch.empty((q.shape[1], q.shape[0]) if packed else q.shape[:3], dtype=torch.float32)
    target = out if out.stride(-1) == 1 else torch.empty(q.shape, dtype=q.dtype)
    alive: list[Tensor] = []  # until the call has returned
    query, key, value, result = (_view(x, packed, alive) for x in (q, k, v, target))
    tokens = (sequences.total_q, sequences.total_k) if packed else (sequences.max_q, sequences.max_k)
    arguments = structs.pack(
        structs.Prefill,
        sequences.batch, q.shape[1], k.shape[1], q.shape[-1], *tokens, int(causal), window or 0, scale,
        0 if sequences.cu_q is None else sequences.cu_q.data_ptr(),
        0 if sequences.cu_k is None else sequences.cu_k.data_ptr(),
        *query, *key, *value, *result, lse.data_ptr(), 0 if packed else lse.stride(0), lse.stride(-2),
        torch.get_num_threads(), library.loaded().isa if isa is None else isa,
    )  # fmt: skip
    if library.call("ta_prefill", arguments) == library.BAD_LENGTHS:
        raise invalid("cu_q, cu_k", f"increasing numbers from 0 to {tokens[0]} and {tokens[1]}", "others")
    if target is not out:
        out.copy_(target)
    return AttentionOutput(out, lse)


def _view(x: Tensor, packed: bool, alive: list[Tensor]) -> structs.View:
    """Of a dense tensor, or of packed ``[tokens, heads, head_dim]`` with a batch stride of 0."""
    if not packed:
        return structs.view_of(x, alive)
    data, _, head, token, dtype = structs.view_of(x.transpose(0, 1)[None], alive)
    return data, 0, head, token, dtype
