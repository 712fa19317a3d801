"""The sidecar: reads the metrics of a server, judges them by limits, responds, and shows its own state."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from turboattention.errors import InvalidInputError, invalid
from turboattention.monitoring.guard import Change, Guard
from turboattention.monitoring.metrics import GuardMetrics
from turboattention.monitoring.responses import Refuse
from turboattention.monitoring.scrape import Totals, difference, fetch, totals

log = logging.getLogger("turboattention.monitoring")


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


def serve(host: str, port: int, metrics: SidecarMetrics, refuse: Refuse | None) -> ThreadingHTTPServer:
    """Show ``/metrics`` and ``/ready`` (503 while new requests should go elsewhere) in a thread of their own.

    port: 0 for any free one. Raises InvalidInputError where the address is taken or not this machine's.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
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
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise invalid("listen", "an address of this machine that is free", f"{host}:{port} ({error})") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
