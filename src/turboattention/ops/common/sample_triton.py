"""`sample` inside of kernels."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

import triton
import triton.language as tl  # noqa: F401 - Triton's interpreter wants to find it in each module with kernels


@triton.jit
def spread(i, count, length):
    """`sample.spread`: sample ``i`` of ``count``."""
    first = (i * length) // count
    return first + (((i * 40503) & 0xFFFF) * (((i + 1) * length) // count - first) >> 16)
