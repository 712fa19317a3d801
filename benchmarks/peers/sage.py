"""SageAttention 1.0.6: INT8 Q K^T with smoothed keys, float16 P V, in Triton; quantisation included."""

from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor

from turboattention.errors import UnsupportedError


def prepare(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    """As `turboattention.bench.baselines.PrefillBaseline`."""
    if find_spec("sageattention") is None:
        raise UnsupportedError("sageattention is not installed")
    from sageattention import sageattn

    k = k.clone()  # it subtracts the mean of the keys in place: those of the other implementations stay as they are

    def call() -> Tensor:
        out: Tensor = sageattn(q, k, v, is_causal=causal)
        return out

    return call
