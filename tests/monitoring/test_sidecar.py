"""The sidecar against pages as prometheus_client writes them: what is judged, and what a broken page is worth."""

import json
import logging
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed (extra 'watch')")

from prometheus_client import CollectorRegistry, generate_latest

import turboattention.monitoring.metrics as metrics_module
from turboattention.errors import InvalidInputError
from turboattention.integrations.vllm.metrics import metrics as engine_metrics
from turboattention.monitoring.codes import CodeRates
from turboattention.monitoring.guard import Guard
from turboattention.monitoring.limits import Limit
from turboattention.monitoring.metrics import WatchMetrics
from turboattention.monitoring.responses import Log, Refuse
from turboattention.monitoring.scrape import Measured, difference, totals
from turboattention.monitoring.shadow import Check
from turboattention.monitoring.sidecar import Sidecar, SidecarMetrics, serve

DASHBOARD = Path(metrics_module.__file__).with_name("grafana.json")
LOGGER = "turboattention.monitoring"


class Server:
    """A server's metrics, or what comes instead of its page."""

    def __init__(self) -> None:
        self.restart()
        self.instead: str | None = None

    def restart(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = WatchMetrics(self.registry)
        self.metrics.stepped(1, 0)

    def check(self, layer: int, error: float, kl: float = 0.001, rank: str = "0") -> None:
        codes = {"key": CodeRates(1000, 10, 50), "value": CodeRates(1000, 5, 40)}
        self.metrics.checked(Check(layer, 0, 500, error, kl, codes, {"key": -0.5}), rank)

    def page(self, url: str, timeout: float) -> str:
        if self.instead == "down":
            raise InvalidInputError("metrics: expected an answer, received refused")
        return generate_latest(self.registry).decode() if self.instead is None else self.instead


def watched(server: Server, *limits: Limit, refuse: Refuse | None = None) -> Sidecar:
    own = SidecarMetrics()
    responses = [Log(), *([refuse] if refuse else [])]
    return Sidecar("http://x/metrics", Guard(limits, responses, own.guard), own, get=server.page)


def test_totals_add_ranks_and_differences_begin_anew_with_the_server():
    server = Server()
    for rank in ("0", "1"):
        server.check(3, 0.1, 0.002, rank)
        server.check(3, 0.2, 0.004, rank)
    before = totals(server.page("", 0))
    assert before["3", "relative_error"] == pytest.approx((0.6, 4, 4))
    assert before["3", "kl"] == pytest.approx((0.012, 4, 4))
    assert before["3", "key_clipped"] == Measured(40, 4000, 4)
    assert before["3", "value_saturated"] == Measured(160, 4000, 4)
    assert before["3", "key_drift"] == Measured(2.0, 4, 4)
    server.check(3, 0.9)
    server.check(5, 0.3)
    new = difference(before, totals(server.page("", 0)))
    assert new["3", "relative_error"] == pytest.approx((0.9, 1, 1))
    assert new["5", "relative_error"] == pytest.approx((0.3, 1, 1))
    server.restart()
    server.check(3, 0.7)
    assert difference(before, totals(server.page("", 0)))["3", "relative_error"] == pytest.approx((0.7, 1, 1))


def test_an_alarm_of_a_layer_makes_the_server_unready_and_is_in_the_sidecars_metrics(
    caplog: pytest.LogCaptureFixture,
):
    server, refuse = Server(), Refuse()
    server.check(0, 9.0)  # before the first read: not judged
    sidecar = watched(server, Limit("relative_error", 0.25, checks=4), refuse=refuse)
    pages = serve("127.0.0.1", 0, sidecar.metrics, refuse)
    address = f"http://127.0.0.1:{pages.server_port}"
    try:
        sidecar.read()
        for _ in range(4):  # two windows for each layer
            for layer, error in ((0, 0.1), (1, 0.4)):
                server.check(layer, error)
                server.check(layer, error)
            sidecar.read()
        assert sidecar.guard.alarms == [("1", "relative_error")]
        assert [r.message for r in caplog.records] == [
            "layer 1: relative_error 0.4, 2 windows above 0.25: alarm raised"
        ]
        with pytest.raises(urllib.error.HTTPError) as unready:
            urllib.request.urlopen(f"{address}/ready", timeout=10)
        assert unready.value.code == 503
        assert b"layer 1: relative_error" in unready.value.read()
        text = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
        for line in ('turboattention_guard_alarm{layer="1",measure="relative_error"} 1.0',
                     'turboattention_guard_alarm{layer="0",measure="relative_error"} 0.0',
                     'turboattention_guard_responses_total{outcome="done",response="log"} 1.0',
                     "turboattention_watch_up 1.0"):  # fmt: skip
            assert line in text
        with pytest.raises(InvalidInputError, match="free"):
            serve("127.0.0.1", pages.server_port, sidecar.metrics, refuse)
        refuse.reset()
        assert urllib.request.urlopen(f"{address}/ready", timeout=10).status == 200
    finally:
        pages.shutdown()
        pages.server_close()
    assert not sidecar.verdict()


@pytest.mark.parametrize(
    ("instead", "words"),
    [
        ("down", "received refused"),
        ('turboattention_shadow_kl_sum{layer="1', "Prometheus text"),
        ("turboattention_watched_steps_total many\n", "Prometheus text"),
        ("<html>busy</html>", "received a page"),
        ("vllm_requests 3.0\n", "serve --watch"),
        ("", "serve --watch"),
    ],
)
def test_a_page_that_cannot_be_read_is_said_once_and_judged_never(
    instead: str, words: str, caplog: pytest.LogCaptureFixture
):
    server = Server()
    sidecar = watched(server, Limit("relative_error", 0.25, checks=1, raise_after=1))
    sidecar.read()
    server.check(1, 0.1)
    sidecar.read()
    server.instead = instead
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(3):
            assert sidecar.read() == []
        assert len(caplog.records) == 1
        assert words in caplog.records[0].message
        assert "turboattention_watch_up 0.0" in generate_latest(sidecar.metrics.registry).decode()
        assert sidecar.verdict()
        server.instead = None
        server.check(1, 0.5)  # nothing that happened meanwhile is lost
        assert [change.layer for change in sidecar.read()] == ["1"]
    assert caplog.records[1].message == "metrics can be read again"
    assert (sidecar.reads, sidecar.failed) == (6, 3)


def test_without_checks_there_is_no_verdict():
    server = Server()
    sidecar = watched(server, Limit("relative_error", 0.25))
    sidecar.run(0.001, reads=3)
    assert sidecar.reads == 3
    with pytest.raises(InvalidInputError, match="expected checked steps to judge by, received none"):
        sidecar.verdict()


def test_the_dashboard_asks_for_metrics_that_exist():
    """Every name in an expression is a sample that some registry of ours can give, every label one of its labels."""
    server = Server()
    server.check(0, 0.1)
    server.metrics.skipped("memory")
    server.metrics.holds(1)
    own = SidecarMetrics()
    own.read(failed=False)
    own.guard.window("0", "kl", 0.1, raised=False)
    own.guard.responded("log", failed=False)
    engine = engine_metrics()
    for metric, labels in ((engine.layers, ("0", "compressed")), (engine.token_bytes, ("0", "turbo4")),
                           (engine.tokens, ("0", "turbo4")), (engine.open_bytes, ("0",)),
                           (engine.faults, ("0", "no_room"))):  # fmt: skip
        metric.labels(*labels)
    known: dict[str, set[str]] = {}
    for registry in (server.registry, own.registry, metrics_module.REGISTRY):
        for family in registry.collect():
            for sample in family.samples:
                known.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) > 10
    for expression in expressions:
        names = re.findall(r"turboattention_\w+", expression)
        assert names, expression
        assert [name for name in names if name not in known] == []
        labels = set(re.findall(r"(\w+)=[~]?\"", expression))
        labels |= {x.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for x in group.split(",")}
        everywhere = set.union(*(known[name] for name in names)) | {"instance", "job"}
        assert labels <= everywhere, (expression, labels)
