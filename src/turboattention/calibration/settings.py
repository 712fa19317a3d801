"""How much a calibration reads and compares."""

from dataclasses import dataclass

from turboattention.calibration.allocate import Granularity
from turboattention.errors import invalid


@dataclass(frozen=True)
class Settings:
    """Everything but the model, the texts and the target.

    tokens: for sensitivities and tuning, in windows of ``window``. held_out_tokens: of each held-out text.
    per: ``head`` or ``layer``, what gets a format of its own (one page size in a layer suits engines).
    probes: sensitivities that are also measured, for the rank correlation; 0 leaves it out.
    curve: also measure other sizes, the paper's presets and rule, and KIVI on held-out text.
    needles: tokens of the haystack of the retrieval test; 0 leaves it out.
    """

    tokens: int = 8192
    window: int = 1024
    held_out_tokens: int = 1024
    per: Granularity = "head"
    probes: int = 12
    curve: bool = True
    needles: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per not in ("head", "layer"):
            raise invalid("per", "head or layer", repr(self.per))
        for name in ("probes", "needles", "seed"):
            if getattr(self, name) < 0:
                raise invalid(name, "0 or more", getattr(self, name))
