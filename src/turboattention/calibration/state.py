"""What a calibration has done so far, in a file: a run that was stopped goes on where it was."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from turboattention.errors import invalid
from turboattention.files import RECORDS, read_json, write_atomic

SCHEMA = 2
_EXPECTED = "what a calibration wrote"
_ANEW = "remove it to begin anew"
T = TypeVar("T")


def fingerprint(data: Any) -> str:
    """A short name for plain data: equal for equal runs alone."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


class State:
    """A dictionary of results by name, written whole or not at all after each of them.

    The file holds a sum of its results: a damaged one is refused, because a wrong number in it would be a wrong policy.
    path: None keeps it in memory. run: fingerprint of everything that decides the results.
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self.path, self.run = path, run
        self._data: dict[str, Any] = {}
        if path is not None and path.exists():
            self._data = self._read(path)

    def get(self, name: str) -> Any:
        """The result ``name``, or None."""
        return self._data.get(name)

    def read(self, name: str, build: Callable[[Any], T]) -> T:
        """``build`` of the result ``name``; raises InvalidInputError where the file holds something else under it."""
        try:
            return build(self._data[name])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            raise invalid("state file", _EXPECTED, f"{self.path}, {name}: {error!r}"[:400], _ANEW) from error

    def put(self, name: str, value: Any) -> None:
        """Keep a result (plain data) and write the file."""
        self._data[name] = value
        if self.path is None:
            return
        results = json.dumps(self._data)
        head = json.dumps({"turboattention_calibration": SCHEMA, "run": self.run, "sha256": _sum(results)})
        text = f'{head[:-1]}, "results": {results}}}'
        write_atomic(self.path, text, "state path")

    def _read(self, path: Path) -> dict[str, Any]:
        data = read_json("state file", path, RECORDS, _EXPECTED, _ANEW)
        if not isinstance(data, dict) or data.get("turboattention_calibration") != SCHEMA:
            raise invalid("state file", _EXPECTED, path, _ANEW)
        if data.get("run") != self.run:
            raise invalid("state file", "one of the same model and dtype", path, _ANEW)
        results = data.get("results")
        if not isinstance(results, dict) or data.get("sha256") != _sum(json.dumps(results)):
            raise invalid("state file", _EXPECTED, f"{path}, whose content has changed since", _ANEW)
        return results


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
