"""What a calibration has done so far, in a file: a run that was stopped goes on where it was."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from turboattention.errors import invalid

SCHEMA = 1
_ANEW = "remove it to begin anew"


def fingerprint(data: Any) -> str:
    """A short name for plain data: equal for equal runs alone."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


class State:
    """A dictionary of results by name, written whole or not at all after each of them.

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

    def put(self, name: str, value: Any) -> None:
        """Keep a result (plain data) and write the file."""
        self._data[name] = value
        if self.path is None:
            return
        text = json.dumps({"turboattention_calibration": SCHEMA, "run": self.run, "results": self._data})
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            raise invalid("state path", "a writable file", f"{self.path} ({error.strerror})") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise invalid("state file", "what a calibration wrote", f"{path}: {error}", _ANEW) from error
        if not isinstance(data, dict) or data.get("turboattention_calibration") != SCHEMA:
            raise invalid("state file", "what a calibration wrote", path, _ANEW)
        if data.get("run") != self.run:
            raise invalid("state file", "one of the same model and dtype", path, _ANEW)
        results: dict[str, Any] = data["results"]
        return results
