"""The newest tokens of a sequence, not yet compressed: exact, or in the paper's clamped INT8 buffer."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from turboattention.checks import check_finite
from turboattention.errors import invalid
from turboattention.quant.affine import divided
from turboattention.quant.progressive import STAGE1_LIMIT, quantize_with_scale


class OpenPage:
    """Exact tokens ``[batch, heads, tokens, head_dim]`` of K and V in ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}

    @property
    def tokens(self) -> int:
        return self.tensors["key"].shape[2] if self.tensors else 0

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add tokens that `checked` returned."""
        for name, x in (("key", key), ("value", value)):
            old = self.tensors.get(name)
            self.tensors[name] = x.clone() if old is None else torch.cat([old, x], 2)

    def checked(self, name: str, x: Tensor) -> Tensor:
        """``x`` in the dtype of this page; raises InvalidInputError for NaN, Inf or values beyond that dtype."""
        stored = x.to(self.dtype)
        # One NaN or Inf shows in the smallest and the largest value: fewer operations than looking at each.
        low, high = stored.aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):
            check_finite(name, x)
            limit, found = f"magnitudes up to {torch.finfo(self.dtype).max:.4g}", f"{float(x.abs().max()):.4g}"
            raise invalid(name, limit, found, "use preset 'fp16' for this model")
        return stored

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V of all tokens held here."""
        return self.tensors["key"], self.tensors["value"]

    def tile_scales(self) -> tuple[Tensor, Tensor] | None:
        """Scales that the compression of these tokens must use; None: each page its own."""
        return None

    @property
    def read_dtype(self) -> torch.dtype:
        """The dtype that holds every token of `read` exactly, those of later steps included."""
        return self.dtype

    @property
    def scaled_tokens(self) -> int:
        """Oldest tokens that are bound to `tile_scales`."""
        return 0

    def settle(self) -> None:
        """The tokens are final: nothing to do for exact ones."""

    def drop_first(self, count: int) -> None:
        """Forget the oldest ``count`` tokens (they are in a page now)."""
        for name in ("key", "value"):
            self.tensors[name] = self.tensors[name][:, :, count:].clone()

    def drop_last(self, count: int) -> None:
        """Forget the newest ``count`` tokens."""
        for name in ("key", "value"):
            self.tensors[name] = self.tensors[name][:, :, : self.tensors[name].shape[2] - count].clone()

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension to every tensor."""
        self.tensors = {name: change(x) for name, x in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values())


class ClampedOpenPage(OpenPage):
    """Settled tokens in INT8 with one universal scale for each head; larger values are clamped (arXiv 2412.08585).

    The scale comes from the first tokens seen. Tokens of the latest step stay exact until they are final.
    """

    @property
    def scaled_tokens(self) -> int:
        return self.tensors["key_codes"].shape[2] if "key_codes" in self.tensors else 0

    @property
    def read_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def tokens(self) -> int:
        return super().tokens + self.scaled_tokens

    def append(self, key: Tensor, value: Tensor) -> None:
        super().append(key, value)
        for name in ("key", "value"):
            if f"{name}_scale" not in self.tensors:
                scale = divided(self.tensors[name].float().abs().amax((-2, -1), keepdim=True), STAGE1_LIMIT)
                self.tensors[f"{name}_scale"] = scale.to(torch.float16)

    def tile_scales(self) -> tuple[Tensor, Tensor] | None:
        return self.tensors["key_scale"], self.tensors["value_scale"]

    def settle(self) -> None:
        for name in ("key", "value"):
            fresh = self.tensors[name]
            codes = quantize_with_scale(fresh, self.tensors[f"{name}_scale"])
            old = self.tensors.get(f"{name}_codes")
            self.tensors[f"{name}_codes"] = codes if old is None else torch.cat([old, codes], 2)
            self.tensors[name] = fresh[:, :, :0].clone()

    def read(self) -> tuple[Tensor, Tensor]:
        parts = []
        for name in ("key", "value"):
            fresh = self.tensors[name]
            codes = self.tensors.get(f"{name}_codes")
            if codes is not None:
                # The product of an INT8 code and a float16 scale needs more than 16 bits to stay exact.
                old = codes.float() * self.tensors[f"{name}_scale"].float()
                fresh = torch.cat([old, fresh.float()], 2)
            parts.append(fresh)
        return parts[0], parts[1]

    def drop_first(self, count: int) -> None:
        settled = min(count, self.scaled_tokens)
        if settled:
            for name in ("key_codes", "value_codes"):
                self.tensors[name] = self.tensors[name][:, :, settled:].clone()
        super().drop_first(count - settled)

    def drop_last(self, count: int) -> None:
        fresh = min(count, super().tokens)
        super().drop_last(fresh)
        if count > fresh:
            for name in ("key_codes", "value_codes"):
                self.tensors[name] = self.tensors[name][:, :, : self.tensors[name].shape[2] - (count - fresh)].clone()
