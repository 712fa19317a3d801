"""What a watch does and what it may cost."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from turboattention.errors import invalid

MIB = 2**20
NO_CLIENT = "prometheus-client: expected version 0.20 or later, received none; pip install 'turboattention[watch]'"


@dataclass(frozen=True)
class WatchSettings:
    """How much is checked.

    share: of the steps whose cache holds compressed pages. seed: decides which steps and heads.
    heads: KV heads of a request whose exact K and V are kept, of all layers together; each request gets the next ones.
    memory_mib: bound of what is kept, all requests together; a head that would exceed it is dropped and counted.
    queries: rows of a longer step that are compared. pages: newest pages of a check whose codes are looked at.
    reference: state file of a calibration (``calibrate --state``), for the drift of scales; None: no drift.
    """

    share: float = 0.01
    seed: int = 0
    heads: int = 4
    memory_mib: float = 64.0
    queries: int = 16
    pages: int = 8
    reference: str | None = None

    def __post_init__(self) -> None:
        for name in ("share", "memory_mib"):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int | float):
                raise invalid(f"watch {name}", "a number", repr(given))
        if not 0.0 < self.share <= 1.0:
            raise invalid("watch share", "above 0, at most 1", self.share)
        if not 0 < self.memory_mib <= 2**40:
            raise invalid("watch memory_mib", "above 0, at most 2**40", f"{self.memory_mib!r}"[:80])
        for name, least in (("seed", 0), ("heads", 1), ("queries", 1), ("pages", 1)):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int) or given < least:
                raise invalid(f"watch {name}", f"a whole number from {least}", repr(given))
        if self.reference is not None and not isinstance(self.reference, str):
            raise invalid("watch reference", "the path of a file", repr(self.reference))

    @classmethod
    def of(cls, given: object) -> "WatchSettings":
        """From plain data; raises InvalidInputError for unknown names and wrong values."""
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or set(given) - set(known):
            raise invalid("watch", f"an object with some of {', '.join(known)}", given)
        arguments: dict[str, Any] = dict(given)
        return cls(**arguments)

    @property
    def memory(self) -> int:
        """The bound in bytes."""
        return int(self.memory_mib * MIB)
