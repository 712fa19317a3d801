"""`quant.packing.permute_tokens` inside of kernels."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

import triton
import triton.language as tl  # noqa: F401 - Triton's interpreter wants to find it in each module with kernels


@triton.jit
def token_at(place):
    """The token at a place of the stored order: place 16a + 4c + 2b + d holds token 16a + 8b + 2c + d."""
    return (place & ~14) | ((place >> 1) & 1) * 8 | ((place >> 2) & 3) * 2
