"""What a step of the engine is, in the terms of the operators."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadata

from turboattention.integrations.vllm.drafts import Drafts
from turboattention.integrations.vllm.parts import ChunkPart
from turboattention.ops.append.packed import Packed

if TYPE_CHECKING:
    from turboattention.integrations.vllm.watch import StepWatch


@dataclass(frozen=True)
class Lengths:
    """Numbers of some sequences before and after their new tokens, int32 ``[sequences]`` on the device.

    before, after: tokens. paged_before, paged_after: those of them in full pages, the latter without pages that hold
    drafts. counts: new tokens.
    rows: of the open-page pool. sinks: the first block, whose pages hold the exact first tokens.
    table: int32 ``[sequences, kv_heads, blocks]``, pages of the pool. fault: gets the bits of `append_paged`.
    """

    before: Tensor
    after: Tensor
    paged_before: Tensor
    paged_after: Tensor
    counts: Tensor
    rows: Tensor
    sinks: Tensor
    table: Tensor
    fault: Tensor

    def part(self, first: int, last: int) -> "Lengths":
        """Sequences ``first .. last - 1``."""
        return Lengths(*(getattr(self, name)[first:last] for name in self.__dataclass_fields__))


@dataclass
class TurboMetadata(AttentionMetadata):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """A batch: sequences of one new token (and drafts behind it) first, then chunks of prompts.

    decodes: how many of the former; decoding: their numbers. decode_tokens: their new tokens. drafts: how they lie
    where any has more than one. prefilling: numbers of the others, None without.
    first_token: of the chunks in the packed tensors. tokens: all new tokens. chunk_starts: where each chunk begins
    and ends among the packed tokens, on the host. cu: the same, int32 on the device, from 0.
    packed: where each chunk begins among all new tokens, and the longest.
    has_prefix: whether any chunk has tokens before it; parts: then the chunks with them (`parts`), on GPUs.
    keep: float32 ``[chunks]``, 0 where a row of the pool begins anew, else 1.
    copies: rows of query statistics to copy before the step (older runner): from, to.
    watch: what a watch looks at in this step, None for nothing.
    """

    decodes: int
    decoding: Lengths
    tokens: int
    prefilling: Lengths | None = None
    decode_tokens: int = 0
    drafts: Drafts | None = None
    first_token: int = 0
    chunk_starts: tuple[int, ...] = ()
    cu: Tensor | None = None
    packed: Packed | None = None
    has_prefix: bool = False
    parts: tuple[ChunkPart, ...] = ()
    keep: Tensor | None = None
    copies: tuple[Tensor, Tensor] | None = None
    watch: "StepWatch | None" = None
