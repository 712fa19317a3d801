"""The operator of INT8 prefill: quantise a chunk, attend to it, by the kernels that fit the device."""

from typing import Literal

import torch
from torch import Tensor

from turboattention.errors import InvalidInputError, MissingDependencyError, UnsupportedError, invalid
from turboattention.ops.dispatch import without_cpu
from turboattention.ops.prefill import int8
from turboattention.ops.prefill.reference import AttentionOutput
from turboattention.ops.prefill.sequences import Sequences

Implementation = Literal["reference", "triton", "hopper", "cpu"]
HOPPER_WIDTH = 128


def int8_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    sequences: Sequences | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> AttentionOutput:
    """Attention of a chunk of queries over its own K and V, both products on INT8.

    q: float16, bfloat16 or float32 ``[batch, heads, queries, head_dim]``, any strides; k, v: the same with KV heads and
    at least the queries' tokens when causal (query head h reads KV head h // ratio; the queries are the last tokens).
    Packed ``[tokens, heads, head_dim]`` with ``sequences=Sequences.packed(...)``.
    scale: factor of the scores, ``head_dim ** -0.5`` when None. window: a query sees at most that many last tokens.
    implementation: ``hopper`` (sm_90, head_dim up to 128, no window), ``triton`` (any GPU; the interpreter on CPU
    tensors), ``cpu`` (C++ kernels) or ``reference``. None takes the first that fits: on a GPU hopper, then triton; on a
    CPU cpu where it was built.

    Returns out, like q in shape, dtype and strides, and lse float32 ``[batch, heads, queries]`` (packed: ``[heads,
    tokens]``), natural logarithm of the sum over the true scores, for merging with other parts of the same rows. Rows
    that see nothing give zeros and -inf. Magnitudes of scores in log2 units must stay below 2^60.
    Raises InvalidInputError for what does not fit, UnsupportedError for softcap and for ``cpu`` where the kernels can't
    run, MissingDependencyError without Triton.
    """
    check_softcap(softcap)
    sequences = sequences or Sequences.dense(q, k)
    sequences.check(q, k, v)
    int8.check_window(window, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_scale(scale)
    implementation = implementation or choose(q, window)
    if implementation == "reference":
        chunk = int8.quantise_chunk(q, k, v, scale, sequences)
        exact = int8.int8_attention(chunk, causal=causal, window=window, dtype=torch.float32)
        return AttentionOutput(exact.out.to(q.dtype), exact.lse)
    _check_implementation(implementation, q, window)
    if implementation == "cpu":
        from turboattention.ops.prefill import int8_cpu

        return int8_cpu.attention(q, k, v, sequences, scale=scale, causal=causal, window=window)
    try:
        from turboattention.ops.prefill import int8_prepass, int8_triton
    except ImportError as error:
        raise MissingDependencyError(
            "INT8 prefill on a GPU needs Triton: pip install 'turboattention[triton]'"
        ) from error
    out = torch.empty_like(q)
    lse = q.new_empty((q.shape[1], q.shape[0]) if sequences.is_packed else q.shape[:3], dtype=torch.float32)
    if implementation == "hopper":
        from turboattention.ops.prefill import hopper

        chunk = int8_prepass.quantise_chunk(q, k, v, scale, sequences, queries=False)
        hopper.attention(q, chunk, out, lse, scale, causal=causal)
    else:
        chunk = int8_prepass.quantise_chunk(q, k, v, scale, sequences)
        int8_triton.attention(chunk, out, lse, causal=causal, window=window)
    return AttentionOutput(out, lse)


def check_softcap(softcap: float | None) -> None:
    """Raise unless ``softcap`` is None."""
    if softcap is not None:
        raise UnsupportedError(
            "softcap: a capped score is no longer an integer times a factor, which INT8 prefill needs; "
            "use 16 bits (chunk_bits 16)"
        )


def check_scale(scale: float) -> None:
    """Raise unless ``scale`` is positive."""
    if not scale > 0:
        raise invalid("scale", "a positive number", scale)


def choose(q: Tensor, window: int | None) -> Implementation:
    """The implementation that ``int8_prefill`` takes when none is named."""
    return choose_for(q.device, q.shape[-1], window)


def choose_for(device: torch.device, head_dim: int, window: int | None = None) -> Implementation:
    """As `choose`, without the tensor."""
    if device.type != "cuda":
        return "reference" if without_cpu(device) else "cpu"
    return "triton" if _why_not_hopper(device, head_dim, window) else "hopper"


def _why_not_hopper(device: torch.device, head_dim: int, window: int | None) -> InvalidInputError | None:
    cuda = device.type == "cuda" and torch.version.hip is None
    if not cuda or torch.cuda.get_device_capability(device) != (9, 0):
        return invalid("implementation", "a Hopper GPU (sm_90) for 'hopper'", device, "use implementation='triton'")
    if head_dim > HOPPER_WIDTH:
        return invalid("head_dim", f"at most {HOPPER_WIDTH} for 'hopper'", head_dim, "use implementation='triton'")
    if window is not None:
        return invalid("window", "None for 'hopper'", window, "use implementation='triton'")
    return None


def _check_implementation(implementation: str, q: Tensor, window: int | None) -> None:
    if implementation not in ("triton", "hopper", "cpu"):
        raise invalid("implementation", "'reference', 'triton', 'hopper', 'cpu' or None", repr(implementation))
    if implementation == "cpu" and (missing := without_cpu(q.device)):
        raise UnsupportedError(f"implementation 'cpu': {missing}")
    error = _why_not_hopper(q.device, q.shape[-1], window) if implementation == "hopper" else None
    if error is not None:
        raise error
