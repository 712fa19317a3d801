"""Listens on an address and serves the page until it is interrupted."""

import socket
from collections.abc import Sequence

import uvicorn

from turboattention.errors import invalid
from turboattention.hosts import LOOPBACK_NAMES, is_loopback
from turboattention.serving.review.app import create_app
from turboattention.serving.review.pairs import PairFile
from turboattention.serving.review.store import Store


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; raises InvalidInputError with the reason. Port 0: any free one."""
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(kind, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen()
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise invalid(
            "--host and --port", "an address of this machine with a free port", f"{host}:{port} ({reason})"
        ) from error
    return bound


def host_headers(host: str, port: int, allowed: Sequence[str]) -> frozenset[str]:
    """What browsers may call this server, with the port.

    Raises InvalidInputError for an address that stands for every one of the machine without names to be called by.
    """
    names = [f"[{host}]" if ":" in host else host]
    if is_loopback(host):
        names += LOOPBACK_NAMES
    elif host in ("0.0.0.0", "::", ""):
        if not allowed:
            raise invalid("--allow-host", f"the name that raters will type, because --host is {host}", "none")
        names = []
    found = [f"{name}:{port}".lower() for name in (*names, *allowed)]
    return frozenset(found + ([name.lower() for name in (*names, *allowed)] if port == 80 else []))


def make_server(store: Store, file: PairFile, hosts: frozenset[str]) -> uvicorn.Server:
    """``run(sockets=[...])`` serves until SIGINT or SIGTERM."""
    app = create_app(store, file, hosts)
    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, proxy_headers=False)
    )
