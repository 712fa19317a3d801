"""Splits the traffic of users between two servers; the share can be changed, or taken back, while it runs.

    python examples/rollout/router.py http://127.0.0.1:8001 http://127.0.0.1:8002 --share-file share --port 8000
    echo 0.2 > share        # a fifth of the requests to the second server
    echo 0 > share          # the way back

A stand-in for the load balancer that you have: nginx's split_clients, Envoy's weighted clusters, a Kubernetes gateway.
"""

import argparse
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2


def make_router(baseline: str, candidate: str, share_file: Path, port: int = 0) -> ThreadingHTTPServer:
    """Listens on 127.0.0.1; ``share_file`` holds the candidate's share of the requests, read at each of them."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"
        counts = {"baseline": 0, "candidate": 0}  # noqa: RUF012  # of this router alone

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._pass_on("GET", b"", baseline)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            # The same request always goes the same way, so that a user does not change sides in a conversation.
            place = int.from_bytes(hashlib.sha256(body).digest()[:4], "big") / 2**32
            chosen = "candidate" if place < float(share_file.read_text()) else "baseline"
            self.counts[chosen] += 1
            self._pass_on("POST", body, candidate if chosen == "candidate" else baseline)

        def _pass_on(self, method: str, body: bytes, server: str) -> None:
            headers = {name: value for name in ("Content-Type", "Authorization") if (value := self.headers.get(name))}
            options: dict[str, Any] = {"content": body, "headers": headers, "timeout": 600, "trust_env": False}
            try:
                with httpx2.stream(method, server + self.path, **options) as reply:
                    self.send_response(reply.status_code)
                    self.send_header("Content-Type", reply.headers.get("Content-Type", "text/plain"))
                    self.end_headers()
                    for part in reply.iter_raw():
                        self.wfile.write(part)
                        self.wfile.flush()
            except httpx2.ConnectError:
                self.send_error(502)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline")
    parser.add_argument("candidate")
    parser.add_argument("--share-file", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    if not arguments.share_file.exists():
        arguments.share_file.write_text("0\n")
    make_router(arguments.baseline, arguments.candidate, arguments.share_file, arguments.port).serve_forever()
