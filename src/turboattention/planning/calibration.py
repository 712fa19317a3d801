"""The measured numbers of the roofline: one small file, made by ``python benchmarks/plan.py fit`` from CSV rows."""

import json
from dataclasses import dataclass
from importlib.resources import files

from turboattention.planning.kv_bytes import Form


@dataclass(frozen=True)
class Fit:
    """Time of attention over a layer's cache: latency_us + bytes / (share_of_bandwidth x the card's bandwidth).

    flops_per_value: so many of the card's dense 16-bit operations pass for each value of K and V, where that is longer
    than reading it: an FP8 cache must be converted. rows: that it was fitted to.
    """

    latency_us: float
    share_of_bandwidth: float
    rows: int
    flops_per_value: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """What was measured on one card; `roofline` says how each number is used.

    gpu: its name in the table. attention: fits by the form's name; a form without one gets no time.
    unit_us: compressed pages, time of one sequence and KV head that short sequences cannot go below.
    append_us: of compressed pages, a layer and step. layer_us: everything else of a layer in a step.
    host_ms: a step takes no less, whatever the card does. prefill_share: of the dense compute.
    exchange_us, link_share: cards that share a layer add up their results twice, which takes so long and a transfer at
    that share of the speed between them; shared_bytes: what each then keeps beside reserve_bytes.
    reserve_bytes: memory that is neither weights nor cache. sources: the rows, in words.
    """

    gpu: str
    attention: dict[str, Fit]
    unit_us: float
    append_us: float
    layer_us: float
    host_ms: float
    prefill_share: float
    exchange_us: float
    link_share: float
    shared_bytes: int
    reserve_bytes: int
    sources: tuple[str, ...]

    def reserved(self, ranks: int) -> int:
        """Bytes of a card that are neither weights nor cache."""
        return self.reserve_bytes + (self.shared_bytes if ranks > 1 else 0)

    def fit(self, form: Form) -> Fit | None:
        """The fit of a form, None where nothing was measured."""
        return self.attention.get(form.name)


def load_calibration() -> Calibration:
    """The file of this package."""
    data = json.loads((files("turboattention.planning") / "calibration.json").read_text(encoding="utf-8"))
    data["attention"] = {name: Fit(**fit) for name, fit in data["attention"].items()}
    data["sources"] = tuple(data["sources"])
    return Calibration(**data)
