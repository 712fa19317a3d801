"""The folder of a run: what was asked, one line an answer as it comes, and the way to go on after a crash.

``run.json``: sides, settings and limits, which must not change when a run goes on, and which models were found.
``requests.jsonl``: what was asked. ``answers.jsonl``: one answer a line. ``pairs.jsonl``: both texts of each sample,
written when a run ends.
"""

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from turboattention.errors import InvalidInputError, invalid
from turboattention.files import RECORDS, parse_json, read_json, write_atomic
from turboattention.serving.answer import SIDES, Answer, SideName
from turboattention.serving.prompts import Request
from turboattention.serving.secrets import Secret, hide
from turboattention.typed import build

SCHEMA = 1
RUN, REQUESTS, ANSWERS, PAIRS = "run.json", "requests.jsonl", "answers.jsonl", "pairs.jsonl"


class DiskError(InvalidInputError):
    """Answers cannot be written any more; those before are kept."""


@dataclass(frozen=True)
class _Found:
    """What `Store.pin` adds to the file of the run."""

    found: dict[str, dict[str, str]]
    remarks: list[str]


@dataclass
class Store:
    """Open it with ``with``; a second process on the same folder is refused.

    settings: JSON-ready; compared with those of an earlier run in the folder.
    retry_errors: forget answers that failed, so that they are asked again.
    """

    folder: Path
    settings: dict[str, Any]
    secrets: tuple[Secret, ...] = ()
    retry_errors: bool = False
    answers: dict[tuple[str, SideName], Answer] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    found: dict[str, dict[str, str]] = field(default_factory=dict)
    _file: FileIO | None = None

    def __enter__(self) -> "Store":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / ANSWERS).open("ab+", buffering=0)
        except OSError as error:
            raise invalid("--out", "a folder that can be written", f"{self.folder} ({error.strerror})") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise invalid("--out", "a folder that no other run uses now", self.folder) from None
        try:
            self._check_settings()
            self._load()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _check_settings(self) -> None:
        path = self.folder / RUN
        now = json.loads(json.dumps({"schema": SCHEMA, **hide(self.settings, self.secrets)}))
        if not (self.folder / ANSWERS).stat().st_size:  # a run that could not start binds nobody
            (self.folder / REQUESTS).unlink(missing_ok=True)
            self._write(path, json.dumps(now, indent=2) + "\n")
            return
        expected = f"a folder with {RUN}, or a new one"
        before = read_json("--out", path, RECORDS, expected)
        if not isinstance(before, dict):
            raise invalid("--out", expected, f"{path} ({type(before).__name__})")
        found, remarks = before.pop("found", {}), before.pop("remarks", [])
        try:
            self.found = build(_Found, {"found": found, "remarks": remarks}, RUN).found
        except InvalidInputError as error:
            raise invalid("--out", expected, f"{path} ({error})") from error
        self.remarks = list(remarks)
        self._refuse_changes(before, now)

    def _refuse_changes(self, before: Any, now: Any, name: str = "") -> None:
        changed = _changes(before, now, name)
        if changed:
            what, old, new = changed[0]
            hint = "limits are set before the answers are seen; " if what.startswith("limits") else ""
            expected = f"the run that {self.folder} holds ({what}: {old})"
            raise invalid("--out", expected, f"{what}: {new}", f"{hint}choose a new folder")

    def pin(self, side: SideName, description: dict[str, str], remarks: Iterable[str]) -> None:
        """What the side turned out to be, such as the model that a server lists: refused when it has changed."""
        description = hide(description, self.secrets)
        if side in self.found:
            self._refuse_changes(self.found[side], description, side)
        self.found[side] = description
        self.remarks += [remark for remark in hide(list(remarks), self.secrets) if remark not in self.remarks]
        data = {"schema": SCHEMA, **hide(self.settings, self.secrets), "found": self.found, "remarks": self.remarks}
        self._write(self.folder / RUN, json.dumps(data, indent=2) + "\n")

    def _load(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # the line that was being written when the run ended
            self._file.truncate(whole)
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
            try:
                answer = Answer.from_dict(parse_json(line))
            except ValueError as error:
                self.remarks.append(f"{ANSWERS}, line {number} cannot be read and is asked again: {error}")
                continue
            self.answers[answer.id, answer.side] = answer
        if self.retry_errors:
            self.answers = {key: answer for key, answer in self.answers.items() if answer.error is None}

    def add(self, answer: Answer) -> None:
        """Write past all buffers of this process; raises DiskError, and the file then ends with a whole line."""
        assert self._file is not None
        line = json.dumps(answer.to_dict(self.secrets), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            written, reason = self._file.write(line), "a part of a line written"
        except OSError as error:
            written, reason = 0, str(error.strerror)
        if written != len(line):
            os.ftruncate(self._file.fileno(), end)
            raise DiskError(
                f"--out: expected room for answers in {self.folder}, received {reason}; {len(self.answers)} answers "
                "are kept: make room and run the same command again"
            )
        # What is compared is what a resumed run would read.
        self.answers[answer.id, answer.side] = Answer.from_dict(json.loads(line))

    def settle(self) -> None:
        """Ask the machine to put everything on the disk."""
        assert self._file is not None
        os.fsync(self._file.fileno())

    def save_requests(self, requests: Iterable[Request]) -> None:
        """Once, so that the folder explains itself."""
        if not (self.folder / REQUESTS).exists():
            self._lines(REQUESTS, (_request(request) for request in requests))

    def save_pairs(self, requests: Iterable[Request]) -> None:
        """Samples that both sides answered without an error, for `review`."""
        self._lines(PAIRS, (pair for request in requests if (pair := self._pair(request)) is not None))

    def _pair(self, request: Request) -> dict[str, Any] | None:
        both = [self.answers.get((request.id, side)) for side in SIDES]
        if any(answer is None or answer.error is not None for answer in both):
            return None
        row: dict[str, Any] = {"id": request.id, "prompt": request.text(), "references": list(request.references)}
        return row | {answer.side: {"text": answer.text} for answer in both if answer is not None}

    def _lines(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(hide(row, self.secrets), ensure_ascii=False) + "\n" for row in rows)
        self._write(self.folder / name, text)

    def _write(self, path: Path, text: str) -> None:
        try:
            write_atomic(path, text, "--out")
        except InvalidInputError as error:
            raise DiskError(str(error)) from error


def _request(request: Request) -> dict[str, Any]:
    asked = {"messages": list(request.messages)} if request.messages else {"prompt": request.prompt}
    reference = {"reference": list(request.references)} if request.references else {}
    return {"id": request.id, **asked, **reference, "max_tokens": request.max_tokens}


def _changes(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*now, *(key for key in before if key not in now)]
        return [change for key in keys for change in _changes(before.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if before == now else [(name, before, now)]
