"""What may look at a transformers cache while it works. Nothing is called where nobody looks."""

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from turboattention.ops.common.cached_kv import CachedKV

if TYPE_CHECKING:
    from turboattention.integrations.transformers import TurboCache


class LayerObserver(Protocol):
    """Of one layer of one cache. Must change nothing that it is given."""

    def appended(self, key: Tensor, value: Tensor) -> None:
        """New tokens ``[batch, kv_heads, tokens, head_dim]`` are in the cache."""

    def attended(
        self, query: Tensor, view: CachedKV, out: Tensor, scaling: float | None, softcap: float | None
    ) -> None:
        """Attention of the newest tokens over ``view``; query, out: ``[batch, heads, tokens, head_dim]``."""

    def cropped(self, length: int) -> None:
        """Only the first ``length`` tokens are left."""

    def rearranged(self) -> None:
        """The rows of the batch are others now, or the content came from elsewhere."""


class CacheObserver(Protocol):
    """Of all caches of an enabled model."""

    def admit(self) -> None:
        """A new request is about to begin; may raise RefusedError."""

    def begin(self, cache: "TurboCache") -> None:
        """An empty cache of a new request."""
