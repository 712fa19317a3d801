"""The sidecar: reads the metrics of a server, judges them by limits, responds, and shows its own state."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from turboattention.errors import InvalidInputError, invalid
from turboattention.hosts import host_name, is_loopback
from turboattention.monitoring.guard import Change, Guard
from turboattention.monitoring.metrics import GuardMetrics
from turboattention.monitoring.responses import Refuse
from turboattention.monitoring.scrape import Totals, difference, fetch, totals

log = logging.getLogger("turboattention.monitoring")
CLIENT_S = 5.0  # for a client to ask and to take its answer
CLIENTS = 32


@dataclass
class SidecarMetrics:
    """The sidecar's own numbers; with those of its guard in one registry."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.guard = GuardMetrics(self.registry)
        self._up = Gauge("turboattention_watch_up", "1 if the last page could be read.", registry=self.registry)
        self._reads = Counter(
            "turboattention_watch_reads", "Pages asked for.", ["outcome"], registry=self.registry
        )  # fmt: skip

    def read(self, failed: bool) -> None:
        """A page was asked for."""
        self._up.set(0 if failed else 1)
        self._reads.labels("failed" if failed else "done").inc()


class Sidecar:
    """One server's watch.

    The first page only says where the sums stand: what happened before is not judged. A page that can't be read is
    no reason for an alarm and none to clear one: it is logged when that begins and when it ends, and
    ``turboattention_watch_up`` is 0 meanwhile.
    """

    def __init__(
        self, url: str, guard: Guard, metrics: SidecarMetrics, *, timeout: float = 5.0,
        get: Callable[[str, float], str] = fetch,
    ) -> None:  # fmt: skip
        """url: of the server's /metrics. get: how a page is read."""
        self.url, self.guard, self.metrics, self.timeout, self._get = url, guard, metrics, timeout, get
        self._before: Totals | None = None
        self.reason: str | None = None  # why the last page could not be read
        self.reads = self.failed = self.checks = 0

    def read(self) -> list[Change]:
        """Read the page once and judge what is new."""
        self.reads += 1
        try:
            now = totals(self._get(self.url, self.timeout))
        except InvalidInputError as error:
            self.failed += 1
            if self.reason is None:
                log.error("%s", error)
            self.reason = str(error)
            self.metrics.read(failed=True)
            self.guard.retry()
            return []
        if self.reason is not None:
            log.warning("metrics can be read again")
        self.reason = None
        self.metrics.read(failed=False)
        changes = []
        if self._before is not None:
            for (layer, measure), new in difference(self._before, now).items():
                if measure == "relative_error":
                    self.checks += new.checks
                changes += self.guard.add(layer, measure, *new)
        self._before = now
        self.guard.retry()
        return changes

    def run(self, interval: float, reads: int | None = None, stop: threading.Event | None = None) -> None:
        """Read every ``interval`` seconds, ``reads`` times or until ``stop``."""
        stop = stop or threading.Event()
        end = time.monotonic()
        while not stop.is_set() and (reads is None or self.reads < reads):
            self.read()
            if reads is not None and self.reads >= reads:
                break
            end = max(end + interval, time.monotonic())
            stop.wait(end - time.monotonic())

    def verdict(self) -> bool:
        """Whether no alarm was raised; raises InvalidInputError when nothing was checked, which says nothing."""
        if self.guard.ever_raised:
            return False
        if not self.checks:
            last = self.reason or "no check in that time; ask for more reads, a larger --watch share or more requests"
            raise invalid("watch", "checked steps to judge by", "none", last)
        return True


def refusal(headers: Message, private: bool) -> str | None:
    """Why a request may not come in, None where it may.

    private: this server is for its own machine. A request without a Host header is no browser's (some health checks
    send none).
    """
    name = headers.get("Host")
    if private and name is not None and not is_loopback(host_name(name)):
        return "this address is for programs of its own machine"
    origin = headers.get("Origin")
    if origin is not None and origin != f"http://{name}":
        return "asked from another site"
    if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        return "asked from another site"
    return None


class _Server(ThreadingHTTPServer):
    """A thread for each client, up to a number that keeps memory small."""

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(CLIENTS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # A connection as a whole has an end too: each byte of a slow client starts the limit of a read anew.
        end = threading.Timer(2 * CLIENT_S, self.shutdown_request, [request])
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


def serve(host: str, port: int, metrics: SidecarMetrics, refuse: Refuse | None) -> ThreadingHTTPServer:
    """Show ``/metrics`` and ``/ready`` (503 while new requests should go elsewhere) in a thread of their own.

    Only GET is answered, and nothing to a page of another site. On a loopback address the Host header must name this
    machine: another name is somebody else's page whose address points here (DNS rebinding). A client that is slow or
    silent loses its connection after `CLIENT_S` seconds, and holds up nobody meanwhile; of more than `CLIENTS` at once
    the later ones are turned away.

    port: 0 for any free one. Raises InvalidInputError where the address is taken or not this machine's.
    """
    private = is_loopback(host)

    class Handler(BaseHTTPRequestHandler):
        timeout = CLIENT_S  # of each read and write
        server_version, sys_version = "turboattention", ""

        def do_GET(self) -> None:
            reason = refusal(self.headers, private)
            if reason is not None:
                self._send(403, f"{reason}\n".encode(), "text/plain")
            elif self.path == "/metrics":
                self._send(200, generate_latest(metrics.registry), "text/plain; version=0.0.4")
            elif self.path == "/ready":
                reason = None if refuse is None else refuse.reason
                self._send(503 if reason else 200, (reason or "ready").encode() + b"\n", "text/plain")
            else:
                self._send(404, b"/metrics and /ready\n", "text/plain")

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
            self.send_header("X-Frame-Options", "DENY")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged."""

    try:
        server = _Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise invalid("listen", "an address of this machine that is free", f"{host}:{port} ({error})") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
