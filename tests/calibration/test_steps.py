"""The parts around the search: target, tokens, state, prediction, breaks."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from turboattention.calibration.breaks import find_breaks
from turboattention.calibration.plan import make_plan
from turboattention.calibration.result import Kind, Point, Retrieval
from turboattention.calibration.state import State
from turboattention.calibration.target import Target
from turboattention.calibration.tune import predicted_at
from turboattention.errors import InvalidInputError
from turboattention.evaluation.result import Interval, Series
from turboattention.evaluation.texts import windows
from turboattention.integrations.models import LoadedModel


def point(bits: float, kl: float, name: str = "p", kind: Kind = "calibrated", late: float = 0.0) -> Point:
    curve = Series([0.0, 64.0, 128.0, 192.0], [0.0, kl, kl, kl + late])
    by_text = {"prose": kl, "code": kl / 2}
    return Point(name, kind, bits, kl, Interval(kl, kl), -1.0, Interval(0, 0), 1 - kl, by_text, curve)


@pytest.mark.parametrize("text", ["max-kl=0.01", "max-ppl-increase=0.5", "bits=3.25"])
def test_targets(text: str) -> None:
    assert str(Target.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl=1", "^target: expected one of max-kl=NUMBER, max-ppl-increase=NUMBER, bits=NUMBER, received 'kl'"),
        ("max-kl", "^target max-kl: expected a positive number, received ''"),
        ("max-kl=x", "^target max-kl: expected a positive number, received 'x'"),
        ("bits=-1", "^target bits: expected a positive number, received -1.0"),
        ("bits=nan", "^target bits: expected a positive number, received nan"),
        ("", "^target: expected one of"),
    ],
)
def test_wrong_targets(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Target.parse(text)


def test_when_a_target_is_met() -> None:
    assert Target("bits", 3.25).met(point(3.25, 1.0))
    assert not Target("bits", 3.25).met(point(3.26, 0.0))
    assert Target("max-kl", 0.01).met(point(9.0, 0.01))
    # Added nats far below zero do not hide a divergence.
    limit = Target("max-ppl-increase", 0.01)
    assert limit.loss == pytest.approx(math.log(1.01))
    assert not limit.met(point(9.0, 0.02))
    assert not limit.met(replace(point(9.0, 0.001), added_nats=0.02))
    assert limit.met(point(9.0, 0.001))


def test_no_token_is_in_two_parts(loaded: LoadedModel, texts: list[Path]) -> None:
    plan = make_plan(loaded.tokenizer, texts, [], 2048, 128, 512)
    assert plan.held_out.equal(windows(loaded.tokenizer, texts, 512))
    assert len(plan.sensitivity) == 12
    assert len(plan.tuning) == 4
    whole = [loaded.tokenizer(path.read_text())["input_ids"] for path in texts]
    places = []
    for row in (*plan.held_out, *plan.sensitivity, *plan.tuning):
        values = row.tolist()
        found = [
            (number, start)
            for number, ids in enumerate(whole)
            for start in range(len(ids) - len(values) + 1)
            if ids[start : start + len(values)] == values
        ]
        assert len(found) == 1
        places += [(found[0][0], found[0][1] + i) for i in range(len(values))]
    assert len(set(places)) == len(places)


def test_other_held_out_texts(loaded: LoadedModel, texts: list[Path]) -> None:
    plan = make_plan(loaded.tokenizer, texts[:1], texts[1:], 1024, 128, 512)
    assert plan.held_out.equal(windows(loaded.tokenizer, texts[1:], 512))
    assert plan.held_out_names == ["second.txt"]
    with pytest.raises(InvalidInputError, match=r"^held-out texts: expected other texts .*first.txt"):
        make_plan(loaded.tokenizer, texts, texts[:1], 1024, 128, 512)


def test_texts_that_are_too_short(loaded: LoadedModel, texts: list[Path]) -> None:
    with pytest.raises(InvalidInputError, match=r"^texts: expected at least 2 windows of 1024 tokens besides"):
        make_plan(loaded.tokenizer, texts[:1], [], 4096, 1024, 3072)
    with pytest.raises(InvalidInputError, match=r"^window: expected a multiple of 64"):
        make_plan(loaded.tokenizer, texts, [], 4096, 100, 512)


def test_state_is_kept_and_refused_for_another_run(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    State(path, "run").put("a", [1, 2.5])
    assert State(path, "run").get("a") == [1, 2.5]
    assert State(path, "run").get("b") is None
    assert [x.name for x in tmp_path.iterdir()] == ["state.json"]
    with pytest.raises(InvalidInputError, match=r"^state file: expected one of the same model and dtype"):
        State(path, "other")
    path.write_text(path.read_text()[:20])
    with pytest.raises(InvalidInputError, match=r"remove it to begin anew$"):
        State(path, "run")
    path.write_text(json.dumps({"turboattention_calibration": 0}))
    with pytest.raises(InvalidInputError, match=r"^state file: expected what a calibration wrote"):
        State(path, "run")


def test_prediction() -> None:
    assert predicted_at(0.01, [(0.005, 0.01), (0.01, 0.02)]) == pytest.approx(0.005)
    assert predicted_at(0.01, [(0.001, 0.001), (0.1, 0.1)]) == pytest.approx(0.01)
    assert predicted_at(0.01, [(0.005, 0.001)]) == pytest.approx(0.05)
    assert predicted_at(0.01, [(0.005, 0.02)]) == pytest.approx(0.0025)


def test_the_first_break_has_the_most_bits() -> None:
    points = [point(4.0, 0.001, "chosen", "chosen"), point(3.0, 0.015), point(3.5, 0.008, late=0.02), point(2.0, 0.1),
              point(5.0, 1.0, "kivi2", "kivi")]  # fmt: skip
    exact = Retrieval("16-bit", 16.0, 0.9, 0.1)
    found = [exact, Retrieval("chosen", 4.0, 0.75, 0.2), Retrieval("turbo4", 4.25, 0.0, 3.0)]
    breaks = find_breaks(points, 0.01, found, exact)
    first, second = breaks[:2]
    assert (first.measure, first.bits_per_value) == ("share of secret codes lost", 4.0)
    assert first.value == pytest.approx(0.15)
    assert (second.measure, second.bits_per_value) == ("KL of the last quarter of a window", 3.5)
    by_name = {x.measure: x for x in breaks}
    assert by_name["KL, nats per token"].bits_per_value == 3.0
    assert by_name["KL of code"].bits_per_value == 2.0
    assert find_breaks(points[:1], None, [], None)[0].bits_per_value is None
