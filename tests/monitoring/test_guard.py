"""Limits, hysteresis and responses."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboattention.errors import InvalidInputError, RefusedError
from turboattention.monitoring.guard import Change, Guard
from turboattention.monitoring.limits import Limit, chosen_limits
from turboattention.monitoring.precision import exact, raised
from turboattention.monitoring.responses import InBackground, RaisePrecision, Refuse, Webhook, WritePolicy
from turboattention.policy import Override, Policy

CHANGE = Change("raised", "3", "relative_error", 0.4, 0.25, 2)


@given(st.lists(st.sampled_from([0.0, 0.0625, 0.125, 0.1875, 0.25, 0.5, float("nan")]), max_size=60),
       st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))  # fmt: skip
def test_alarms_have_hysteresis(means: list[float], up: int, down: int, checks: int):
    """An alarm changes only after so many windows in a row beyond its bound, and always then; others stay apart."""
    guard = Guard([Limit("kl", 0.25, 0.125, checks=checks, raise_after=up, clear_after=down)])
    history: list[float] = []
    standing = False
    for mean in means:
        changes: list[Change] = []
        for _ in range(checks):
            assert not changes  # only the last check of a window closes it
            changes = guard.add("1", "kl", mean)
            guard.add("2", "kl", 0.1875)
        history.append(mean)
        last = history[-(down if standing else up) :]
        beyond = [x < 0.125 for x in last] if standing else [not x <= 0.25 for x in last]
        changed = len(last) == (down if standing else up) and all(beyond)
        assert [change.state for change in changes] == (["cleared" if standing else "raised"] if changed else [])
        if changed:
            standing, history = not standing, []
        assert guard.alarms == ([("1", "kl")] if standing else [])


def test_limits_of_layers_and_their_texts():
    limit = Limit.parse("relative_error=0.2:0.1")
    assert (limit.high, limit.low) == (0.2, 0.1)
    chosen = {x.measure: x for x in chosen_limits(["kl=0.02"], {"0": 0.1, "1": 0.01}, 3.0)}
    assert chosen["kl"].bounds("5") == pytest.approx((0.02, 0.016))
    assert chosen["relative_error"].bounds("0") == pytest.approx((0.3, 0.24))
    assert chosen["relative_error"].bounds("1") == pytest.approx((0.03, 0.024))
    assert chosen["relative_error"].bounds("7") == (0.25, 0.2)
    for text in ("kl", "kl=", "kl=x", "kl=0.1:0.2", "kl=-1", "kl=inf", "kl=nan", "loss=1"):
        with pytest.raises(InvalidInputError, match="limit"):
            Limit.parse(text)
    with pytest.raises(InvalidInputError, match="each measure once"):
        chosen_limits(["kl=1", "kl=2"])


def test_a_fault_is_an_alarm_at_once_and_clears_when_none_come():
    guard = Guard(chosen_limits())
    assert guard.add("all", "faults", 0.0) == []
    assert [x.text for x in guard.add("all", "faults", 2.0)] == ["all layers: faults 2, 1 window above 0: alarm raised"]
    assert [x.state for _ in range(4) for x in guard.add("all", "faults", 0.0)] == ["cleared"]


def test_a_response_that_fails_is_said_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "full"
    write = WritePolicy(Policy.from_preset("turbo4"), folder / "policy.json")
    guard = Guard([Limit("kl", 0.1, checks=1, raise_after=1)], [write])
    guard.add("3", "kl", 1.0)
    assert guard.unanswered == 1
    failures = [r.message for r in caplog.records]
    assert len(failures) == 1
    assert failures[0].startswith("write policy failed and will be tried again: policy path: expected a writable file")
    folder.mkdir()
    guard.add("7", "kl", 1.0)
    assert guard.unanswered == 0
    written = Policy.load(folder / "policy.json")
    assert written.overrides == (Override(16, 3), Override(16, 7))
    assert written.provenance == {"raised_layers": [3, 7]}
    assert [p.name for p in folder.iterdir()] == ["policy.json"]


def test_precision_goes_up_a_level_for_the_heads_that_have_it_to_give():
    policy = Policy.from_preset("turbo2")
    once = raised(policy, [1], 2)
    twice = raised(once, [1], 2)
    bits = [[fmt.bits for pair in p.head_formats(1, 2) for fmt in pair] for p in (policy, once, twice)]
    assert bits == [[2] * 4, [4] * 4, [8] * 4]
    assert twice.head_formats(0, 2) == policy.head_formats(0, 2)
    assert twice.name == "turbo2, raised"
    mixed = Policy("mixed", policy.cache, overrides=(Override(16, 0, 0, "key"), Override(3, 0, 1, "value")))
    assert [(k.bits, v.bits) for k, v in raised(mixed, [0], 2).head_formats(0, 2)] == [(16, 4), (4, 4)]
    top = exact(policy, [0])
    assert raised(top, [0], 2) is top
    assert exact(top, [0]) is top


def test_refuse_and_raise_follow_alarms(caplog: pytest.LogCaptureFixture):
    refuse, used = Refuse(), []
    refuse(CHANGE)
    with pytest.raises(RefusedError, match=r"layer 3: relative_error 0\.4, 2 windows above 0\.25"):
        refuse.admit()
    refuse(Change("cleared", "3", "relative_error", 0.1, 0.2, 4))
    refuse.admit()
    at_top = exact(Policy.from_preset("turbo4"), [3])
    for policy in (Policy.from_preset("turbo4"), at_top):
        RaisePrecision(lambda policy=policy: policy, lambda p, layer: used.append((p, layer)), 2)(CHANGE)
    assert [layer for _, layer in used] == ["3"]
    assert "at 16 bits already" in caplog.text


@contextmanager
def listener(status: int = 200) -> Iterator[tuple[str, list[bytes]]]:
    got: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook?key=SECRET", got
    finally:
        server.shutdown()
        server.server_close()


def test_webhooks_say_what_happened_and_never_show_their_address(caplog: pytest.LogCaptureFixture):
    with listener() as (url, got):
        Webhook(url)(CHANGE)
        background = InBackground(Webhook(url))
        background(CHANGE)
        assert background.thread is not None
        background.thread.join(10)
    assert len(got) == 2
    body = json.loads(got[0])
    assert body.pop("text") == f"turboattention: {CHANGE.text}"
    assert body == {"version": 1, "state": "raised", "layer": "3", "measure": "relative_error", "value": 0.4,
                    "bound": 0.25, "windows": 2}  # fmt: skip
    with listener(500) as (url, got), pytest.raises(InvalidInputError, match="received status 500") as error:
        Webhook(url)(CHANGE)
    background = InBackground(Webhook(url))  # nobody listens there any more
    background(CHANGE)
    assert background.thread is not None
    background.thread.join(10)
    assert "webhook failed: webhook 127.0.0.1: expected an answer" in caplog.text
    assert "SECRET" not in caplog.text + str(error.value)
    with pytest.raises(InvalidInputError) as error:
        Webhook("file:///etc/SECRET")
    assert "SECRET" not in str(error.value)
