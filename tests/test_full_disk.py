"""A disk that fills up in the middle of a file: one clear error, the old file whole, nothing else left behind.

The limit of the process on the size of a file makes ``write`` itself fail, after a part has been written.
"""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from turboattention.calibration.state import State
from turboattention.errors import InvalidInputError
from turboattention.files import write_atomic
from turboattention.monitoring.guard import Change
from turboattention.monitoring.responses import WritePolicy
from turboattention.policy import Policy
from turboattention.serving.store import RUN, Store

ROOM = 200  # bytes, less than any of these files


@contextmanager
def little_room() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def state(path: Path) -> None:
    kept = State(path, "run")
    kept.put(f"more {len(kept._data)}", "x" * 10 * ROOM)


def next_policy(path: Path) -> None:
    WritePolicy(Policy.from_preset("turbo4"), path)(Change("raised", "1", "kl", 1.0, 0.5, 2))


def run(path: Path) -> None:
    """``path`` is the run's file."""
    with Store(path.parent, {"seed": 0, "more": "x" * 10 * ROOM}):
        pass


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "report": ("report.html", lambda path: write_atomic(path, "x" * 10 * ROOM)),
    "policy": ("policy.json", lambda path: Policy.from_preset("turbo4").save(path)),
    "state of a calibration": ("state.json", state),
    "next policy of a watch": ("next.json", next_policy),
    "run of ab": (RUN, run),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name: str, tmp_path: Path) -> None:
    file, write = WRITERS[name]
    path = tmp_path / file
    write(path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with little_room(), pytest.raises(InvalidInputError) as error:
        write(path)
    assert str(path) in str(error.value)
    assert "File too large" in str(error.value)
    assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    write(path)  # and with room again it goes on
