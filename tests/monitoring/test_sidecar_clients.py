"""Who may ask the sidecar, and what a slow, silent or greedy client costs the others."""

import http.client
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed (extra 'watch')")

from hypothesis import given, settings
from hypothesis import strategies as st

import turboattention.monitoring.sidecar as sidecar
from turboattention.errors import InvalidInputError
from turboattention.hosts import host_name, is_loopback
from turboattention.monitoring.scrape import LARGEST_PAGE, fetch, totals
from turboattention.monitoring.sidecar import SidecarMetrics, serve


@pytest.fixture
def port() -> Iterator[int]:
    pages = serve("127.0.0.1", 0, SidecarMetrics(), None)
    yield pages.server_port
    pages.shutdown()
    pages.server_close()


def ask(port: int, headers: dict[str, str], method: str = "GET", path: str = "/ready") -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            if value:
                connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        answer.read()
        return answer.status, dict(answer.getheaders())
    finally:
        connection.close()


def test_who_may_ask(port: int) -> None:
    own = f"127.0.0.1:{port}"
    for good in (
        {}, {"Host": own}, {"Host": f"localhost:{port}"}, {"Host": "LOCALHOST"}, {"Host": f"[::1]:{port}"},
        {"Host": "127.0.0.1:80"},  # behind a forwarded port
        {"Host": ""},  # none at all: a health check of HTTP 1.0
        {"Host": own, "Origin": f"http://{own}"}, {"Host": own, "Sec-Fetch-Site": "none"},
    ):  # fmt: skip
        assert ask(port, good)[0] == 200, good
    for bad in (
        {"Host": f"evil.example:{port}"}, {"Host": "evil.example"}, {"Host": f"127.0.0.1.evil.example:{port}"},
        {"Host": f"localhost.evil.example:{port}"}, {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
        {"Host": own, "Origin": "http://evil.example"}, {"Host": own, "Origin": "null"},
        {"Host": own, "Origin": f"https://{own}"}, {"Host": own, "Sec-Fetch-Site": "cross-site"},
        {"Host": own, "Sec-Fetch-Site": "same-site"}, {"Host": "[evil"},
    ):  # fmt: skip
        for path in ("/ready", "/metrics", "/other"):
            assert ask(port, bad, path=path)[0] == 403, bad
    # Nothing can be changed by asking, so nothing but GET is answered.
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"):
        assert ask(port, {"Host": own, "Origin": "http://evil.example"}, method)[0] == 501
    status, headers = ask(port, {"Host": own})
    assert status == 200
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Server"].strip() == "turboattention"
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_an_address_that_others_reach_goes_by_any_name() -> None:
    pages = serve("0.0.0.0", 0, SidecarMetrics(), None)
    try:
        assert ask(pages.server_port, {"Host": "box.example:9109"})[0] == 200
        assert ask(pages.server_port, {"Host": "box.example", "Origin": "http://evil.example"})[0] == 403
    finally:
        pages.shutdown()
        pages.server_close()


def test_names() -> None:
    for header, name in (("A.b:1", "a.b"), ("[::1]:80", "::1"), ("[::1", "::1"), ("127.0.0.1", "127.0.0.1"), (":", "")):
        assert host_name(header) == name
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "", "127.1", "10.0.0.1", "localhost.evil.example")))


def is_open(connection: socket.socket) -> bool:
    """Whether the server still waits at the other end."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    finally:
        connection.settimeout(20)


def test_slow_clients_hold_up_nobody(port: int) -> None:
    slow = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(6)]
    try:
        for connection in slow[:5]:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nX: ")  # and no more
        assert ask(port, {}, path="/metrics")[0] == 200
        assert all(map(is_open, slow))  # it was answered while all of them were waited for
    finally:
        for connection in slow:
            connection.close()


@pytest.mark.parametrize("dripping", [False, True])
def test_slow_clients_lose_their_connection(dripping: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "CLIENT_S", 0.3)
    pages = serve("127.0.0.1", 0, SidecarMetrics(), None)
    connection = socket.create_connection(("127.0.0.1", pages.server_port), timeout=20)
    try:
        end = time.monotonic() + 20
        while is_open(connection):
            assert time.monotonic() < end
            time.sleep(0.05)  # less than the limit of one read
            with suppress(ConnectionError):
                connection.sendall(b"X" if dripping else b"")
    finally:
        connection.close()
        pages.shutdown()
        pages.server_close()


def test_too_many_clients_are_turned_away_and_later_ones_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "CLIENTS", 3)
    monkeypatch.setattr(sidecar, "CLIENT_S", 60)
    pages = serve("127.0.0.1", 0, SidecarMetrics(), None)
    held = [socket.create_connection(("127.0.0.1", pages.server_port), timeout=20) for _ in range(10)]
    try:
        for connection in held[3:]:  # in the order in which they came
            with suppress(ConnectionError):
                assert connection.recv(1) == b""
        assert all(map(is_open, held[:3]))
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            ask(pages.server_port, {})
        held[0].close()
        end = time.monotonic() + 20
        while True:
            with suppress(ConnectionError, http.client.HTTPException):
                assert ask(pages.server_port, {})[0] == 200
                break
            assert time.monotonic() < end
    finally:
        for connection in held:
            connection.close()
        pages.shutdown()
        pages.server_close()


GOOD = (
    "# TYPE turboattention_watched_steps counter\nturboattention_watched_steps_total{rank=\"0\"} 3.0\n"
    "# TYPE turboattention_shadow_kl histogram\nturboattention_shadow_kl_bucket{layer=\"1\",le=\"+Inf\"} 2.0\n"
    "turboattention_shadow_kl_count{layer=\"1\"} 2.0\nturboattention_shadow_kl_sum{layer=\"1\"} 0.5\n"
    "turboattention_shadow_relative_error_count{layer=\"1\"} 2.0\n"
    "turboattention_shadow_relative_error_sum{layer=\"1\"} 0.1\n"
)  # fmt: skip
TOKENS = ["NaN", "+Inf", "-Inf", "1e400", "-3", "1e308", "x", "", "{", "}", '"', "\\", "\n", "#", "# TYPE", "=", ","]


@pytest.mark.parametrize("count", ["NaN", "+Inf", "-1.0", "1e300"])
def test_counts_that_are_none(count: str) -> None:
    """Such a page ended the sidecar with a traceback before."""
    with pytest.raises(InvalidInputError, match="counts from 0"):
        totals(GOOD.replace('kl_count{layer="1"} 2.0', f'kl_count{{layer="1"}} {count}'))


@settings(max_examples=150)
@given(st.data())
def test_whatever_a_page_holds(data: st.DataObject) -> None:
    page = GOOD
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(page)))
        until = min(len(page), at + data.draw(st.integers(0, 12)))
        page = page[:at] + data.draw(st.sampled_from(TOKENS) | st.text(max_size=5)) + page[until:]
    with suppress(InvalidInputError):
        assert all(measured.checks >= 0 for measured in totals(page).values())


@pytest.mark.parametrize("kind", ["dripping", "endless"])
def test_a_server_that_never_ends_its_page(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def server() -> None:
        client, _ = listening.accept()
        with client:
            client.recv(1000)
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            try:
                while not over.is_set():
                    client.sendall(b"x" * (1 if kind == "dripping" else 2**16))
                    over.wait(0.05 if kind == "dripping" else 0)
            except OSError:
                pass

    thread = threading.Thread(target=server)
    thread.start()
    if kind == "endless":
        monkeypatch.setattr("turboattention.monitoring.scrape.LARGEST_PAGE", 2**20)
    start = time.perf_counter()
    try:
        with pytest.raises(InvalidInputError, match="timed out" if kind == "dripping" else "at most 1048576 bytes"):
            fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/metrics", 0.5 if kind == "dripping" else 30)
        assert time.perf_counter() - start < 5
    finally:
        over.set()
        thread.join(10)
        listening.close()
    assert LARGEST_PAGE == 64 * 2**20
