"""``turboattention watch`` against a server of made-up metrics: exit status, files, mistakes."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("prometheus_client", reason="prometheus-client is not installed (extra 'watch')")

from prometheus_client import CollectorRegistry, generate_latest

from turboattention.cli.main import main
from turboattention.monitoring.metrics import WatchMetrics
from turboattention.monitoring.shadow import Check
from turboattention.policy import Override, Policy

ERRORS = {0: 0.05, 1: 0.5}  # of layers


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server whose every read finds eight new checks of each layer."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    registry = CollectorRegistry()
    metrics = WatchMetrics(registry)
    metrics.stepped(1, 1)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                for _ in range(8):
                    for layer, error in ERRORS.items():
                        metrics.checked(Check(layer, 0, 100, error, 0.001))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(generate_latest(registry) if self.path == "/metrics" else b"nothing_else 1\n")

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()


def run(url: str, *more: object) -> int:
    quick = ["--interval", "0.01", "--reads", "4", "--listen", "127.0.0.1:0"]
    return main(["watch", "--metrics-url", url, *quick, *map(str, more)])


def test_an_alarm_is_exit_status_1_and_writes_the_next_policy(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    result, policy = tmp_path / "result.json", tmp_path / "next.json"
    assert run(url, "--json", result, "--policy", "turbo4", "--write-policy", policy) == 1
    assert "4 reads (0 failed), 48 checks; alarms that stand: layer 1 relative_error" in capsys.readouterr().out
    assert Policy.load(policy).overrides == (Override(16, 1),)
    assert f"turboattention serve --policy {policy}" in caplog.text
    found = json.loads(result.read_text())
    assert (found["alarm_raised"], found["checks"], found["unanswered_responses"]) == (True, 48, 0)
    assert found["standing"] == [{"layer": "1", "measure": "relative_error"}]


def test_limits_of_a_calibration_and_a_dashboard(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = tmp_path / "calibration.json"
    heads = [{"layer": layer, "head": 0, "bound": 1.0, "seen": seen} for layer, seen in ((0, 0.04), (1, 0.3))]
    calibration.write_text(json.dumps({"schema": 1, "heads": heads}))
    assert run(url, "--calibration", calibration) == 0
    assert "alarms that stand: none" in capsys.readouterr().out
    assert run(url, "--calibration", calibration, "--factor", 1.1) == 1
    assert "layer 0 relative_error, layer 1 relative_error" in capsys.readouterr().out
    board = tmp_path / "board.json"
    assert main(["watch", "--dashboard", str(board)]) == 0
    assert json.loads(board.read_text())["title"] == "TurboAttention"


def test_mistakes(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One line each; an address that holds a secret is not in it. A server without a watch is no success."""
    hook = tmp_path / "hook.txt"
    hook.write_text("mailto:SECRET")
    nobody = "http://127.0.0.1:9/metrics"
    for arguments, words in (
        (["--interval", "1"], "--metrics-url: expected"),
        (["--metrics-url", "file:///etc/passwd"], "http or https"),
        (["--metrics-url", url, "--limit", "loss=1"], "limit: expected one of relative_error"),
        (["--metrics-url", url, "--listen", "9109"], "HOST:PORT"),
        (["--metrics-url", url, "--listen", "no.such.host.invalid:0"], "listen: expected"),
        (["--metrics-url", url, "--webhook", f"@{hook}"], "http or https address"),
        (["--metrics-url", url, "--webhook", "@none"], "--webhook: expected a readable file"),
        (["--metrics-url", url, "--write-policy", str(tmp_path / "p.json")], "--policy beside it"),
        (["--metrics-url", url, "--policy", "turbo4"], "--write-policy beside it"),
        (["--metrics-url", url, "--interval", "0"], "--interval"),
        (["--metrics-url", url, "--calibration", str(hook)], "calibration result: expected JSON"),
        (["--metrics-url", nobody, "--listen", "127.0.0.1:0", "--reads", "2", "--interval", "0.01"], "refused"),
        (["--metrics-url", url.replace("/metrics", "/other"), "--listen", "127.0.0.1:0", "--reads", "2",
          "--interval", "0.01"], "serve --watch"),
    ):  # fmt: skip
        assert main(["watch", *arguments]) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert words in lines[0]
        assert "SECRET" not in lines[0] + caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["hook.txt"]
