"""Which values share one scale and one zero: per token, per channel, per group of channels, or per block.

The tensors meant here are pages ``[..., tokens, channels]`` of one key/value head.
"""

from dataclasses import dataclass

from turboattention.errors import invalid


@dataclass(frozen=True)
class PerToken:
    """One scale for each token, shared by all channels (the choice for V: nothing has to wait for later tokens)."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each channel of a page, shared by its tokens (for K: outlier channels keep to themselves)."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each token and each ``size`` neighbouring channels (KIVI's choice for V, arXiv 2402.02750)."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise invalid("group size", "1 or more channels", self.size)


@dataclass(frozen=True)
class PerBlock:
    """One scale for a whole page (stage 1 of FlashQ, arXiv 2412.08585)."""


Granularity = PerToken | PerChannel | PerGroup | PerBlock
