"""Measures of quantisation error. All compute in float64 and return Python floats."""

import math

from torch import Tensor


def relative_rms(approximation: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact values; 0 when both are zero."""
    error, norm = (approximation.double() - exact.double()).norm().item(), exact.double().norm().item()
    return error / norm if norm else (0.0 if error == 0.0 else math.inf)


def sqnr_db(approximation: Tensor, exact: Tensor) -> float:
    """Signal to quantisation-noise ratio in decibels; infinite without error."""
    ratio = relative_rms(approximation, exact)
    return -20.0 * math.log10(ratio) if ratio else math.inf


def max_error(approximation: Tensor, exact: Tensor) -> float:
    """Largest absolute error."""
    return (approximation.double() - exact.double()).abs().max().item() if exact.numel() else 0.0
