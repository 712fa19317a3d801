"""A hand-made CalibrationResult: the report needs no model."""

from turboattention.calibration.result import (
    Break,
    CalibrationResult,
    HeadError,
    Kind,
    LayerBits,
    Point,
    ProbeResult,
    Retrieval,
)
from turboattention.evaluation.result import Interval, Series


def point(name: str, kind: Kind, bits: float, kl: float) -> Point:
    curve = Series([64.0 * n for n in range(16)], [0.0, *[kl * (1 + n / 16) for n in range(15)]])
    interval = Interval(0.9 * kl, 1.1 * kl)
    return Point(name, kind, bits, kl, interval, kl / 2, interval, 1 - kl, {"prose": kl, "code": kl / 2}, curve)


def calibration(
    model: str = "smollm2-135m", name: str = "calibrated max-kl=0.005", probes: bool = True
) -> CalibrationResult:
    points = [
        point(name, "chosen", 3.61, 0.0047),
        point("turbo4", "uniform", 4.27, 0.0021),
        point("turbo3", "uniform", 3.27, 0.0125),
        point("calibrated 2.5", "calibrated", 2.5, 0.0291),
        point("paper's rule, our formats", "rule", 3.2, 0.0402),
        point("paper3", "paper", 3.6, 0.2021),
        point("kivi2", "kivi", 3.81, 0.1453),
    ]
    return CalibrationResult(
        environment={"python": "3.11.4", "packages": {"torch": "2.13.0"}},
        model=model,
        texts=["moby-dick"],
        held_out=["prose", "code"],
        tokens=16384,
        held_out_tokens=1024,
        target="max-kl=0.005",
        per="head",
        seed=0,
        predicted_kl=0.0043,
        tuning=point(name, "calibrated", 3.61, 0.0049),
        points=points,
        within_target=True,
        layers=[LayerBits(n, 3.0 + n % 2, 3.0, 0.25) for n in range(4)],
        probes=[ProbeResult(f"{n}.0.key", "2", 10.0**-n, 2 * 10.0**-n) for n in range(1, 6)] if probes else [],
        spearman=0.97 if probes else None,
        depth=[0.01, 0.013, 0.016, 0.02],
        heads=[HeadError(n, head, 2.5, 0.04) for n in range(4) for head in range(2)],
        retrieval=[Retrieval("16-bit", 16.0, 0.67, 0.31), Retrieval(name, 3.61, 0.6, 0.37)],
        retrieval_tokens=2048,
        breaks=[
            Break("share of changed top tokens", 0.05, 3.0, 0.0613),
            Break("share of secret codes lost", 0.1, None, None),
        ],
        seconds={"sensitivities": 71.4, "tuning": 40.2},
    )
