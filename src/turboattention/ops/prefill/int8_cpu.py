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
    out = torch.empty_like(q)  # with its strides
    lse = torch.empty((q.shape[1], q.shape[0]) if sequences.is_packed else q.shape[:3], dtype=torch.float32)
    target = out if out.stride(-1) == 1 else torch.empty(q.shape, dtype=q.dtype)
    alive = [structs.readable(x) for x in (q, k, v)]
    views = [_view(x, sequences.is_packed) for x in alive]
    tokens = (sequences.total_q, sequences.total_k) if sequences.is_packed else (sequences.max_q, sequences.max_k)
    arguments = structs.Prefill(
        sequences.batch, q.shape[1], k.shape[1], q.shape[-1], *tokens, int(causal), window or 0, scale,
        None if sequences.cu_q is None else sequences.cu_q.data_ptr(),
        None if sequences.cu_k is None else sequences.cu_k.data_ptr(),
        *views, _view(target, sequences.is_packed), lse.data_ptr(), 0 if sequences.is_packed else lse.stride(0),
        lse.stride(-2), torch.get_num_threads(), library.loaded().isa if isa is None else isa,
    )  # fmt: skip
    if library.call("ta_prefill", arguments) == library.BAD_LENGTHS:
        raise invalid("cu_q, cu_k", f"increasing numbers from 0 to {tokens[0]} and {tokens[1]}", "others")
    if target is not out:
        out.copy_(target)
    return AttentionOutput(out, lse)


def _view(x: Tensor, packed: bool) -> structs.TensorView:
    """Of a dense tensor, or of packed ``[tokens, heads, head_dim]`` with a batch stride of 0."""
    if not packed:
        return structs.view_of(x)
    token, head, _ = x.stride()
    return structs.TensorView(x.data_ptr(), 0, head, token, structs.DTYPES[x.dtype])
