"""Judgements in one SQLite file: who saw which pair on which side, and what they chose."""

import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, get_args

from turboattention.errors import InvalidInputError, invalid
from turboattention.serving.review.pairs import PairFile

SCHEMA = 1
Choice = Literal["left", "right", "tie", "both_bad"]
CHOICES: tuple[str, ...] = get_args(Choice)
LONGEST_NAME = 64
WAIT_S = 5.0  # for another process that writes

_TABLES = """
CREATE TABLE IF NOT EXISTS review (schema INTEGER, pairs TEXT, seed INTEGER);
CREATE TABLE IF NOT EXISTS assignment (
    rater TEXT, position INTEGER, pair TEXT, candidate_left INTEGER, PRIMARY KEY (rater, position), UNIQUE (rater, pair)
);
CREATE TABLE IF NOT EXISTS judgement (
    number INTEGER PRIMARY KEY AUTOINCREMENT, rater TEXT, position INTEGER, choice TEXT, at REAL,
    UNIQUE (rater, position), FOREIGN KEY (rater, position) REFERENCES assignment (rater, position)
);
"""
_NAMES = {"review", "assignment", "judgement"}
_COLUMNS = {
    "assignment": {"rater": "text", "position": "integer", "pair": "text", "candidate_left": "integer"},
    "judgement": {"rater": "text", "position": "integer", "choice": "text"},
}
_EXPECTED = "a file of turboattention review, or a new name"


class StoreError(InvalidInputError):
    """The file cannot be written now; what was stored before is kept."""


class Place(NamedTuple):
    """Where a rater stands: the pair to judge next, None at the end.

    position: of that pair in the rater's own order, from 0; total: of all. candidate_left: which side is which.
    """

    position: int
    total: int
    pair: str | None
    candidate_left: bool


class Judgement(NamedTuple):
    """choice: as it was seen."""

    rater: str
    pair: str
    candidate_left: bool
    choice: str


def check_rater(name: object) -> str:
    """A rater's name without white space around it; raises InvalidInputError."""
    cleaned = name.strip() if isinstance(name, str) else ""
    if not cleaned or len(cleaned) > LONGEST_NAME or not cleaned.isprintable():
        raise invalid("name", f"1 to {LONGEST_NAME} printable characters", repr(name)[:80])
    return cleaned


class Store:
    """Open it with ``with``; calls may come from several threads.

    Raises InvalidInputError where the file belongs to other pairs, another seed or something else, StoreError where it
    cannot be written.
    """

    def __init__(self, path: Path, file: PairFile, seed: int) -> None:
        self.path, self._file, self.seed = path, file, seed
        self._lock = threading.Lock()

    def __enter__(self) -> "Store":
        with self._explained():
            # Autocommit: every change below is one transaction that says so itself.
            self._db = sqlite3.connect(self.path, timeout=WAIT_S, check_same_thread=False, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors in our words."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorname", "") == "SQLITE_ERROR":  # a column or table that is not there
                raise invalid("--data", _EXPECTED, f"{self.path} ({error})") from error
            raise StoreError(
                f"--data: expected to write {self.path}, received {error}; judgements before are kept: make room, or "
                "stop the program that holds it, and judge again"
            ) from error
        # UnicodeDecodeError: names or messages of a damaged file, which the module decodes.
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise invalid("--data", _EXPECTED, f"{self.path} ({error})") from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction, whole or not at all."""
        with self._lock, self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it already
                    self._db.execute("ROLLBACK")
                raise

    def _prepare(self) -> None:
        # A file of somebody else may hold more than tables, and SQLite would run it.
        self._db.execute("PRAGMA trusted_schema = OFF")
        self._db.execute("PRAGMA cell_size_check = ON")
        found = dict(self._db.execute("SELECT name, type FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall())
        if found and (set(found) - _NAMES or "review" not in found or set(found.values()) != {"table"}):
            raise invalid("--data", _EXPECTED, f"another database, {self.path}")
        if found and self._db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise invalid("--data", _EXPECTED, f"{self.path}, which is damaged")
        self._db.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
        now = (SCHEMA, self._file.fingerprint, self.seed)
        with self._change() as db:
            before = db.execute("SELECT schema, pairs, seed FROM review").fetchone()
            if before is None:
                db.execute("INSERT INTO review VALUES (?, ?, ?)", now)
                return
        for name, old, new in zip(("schema", "pairs", "seed"), before, now, strict=True):
            if old != new:
                raise invalid("--data", f"the {name} that {self.path} was begun with ({str(old)[:12]})", str(new)[:12])
        self._check_rows()

    def _check_rows(self) -> None:
        """Raise unless every row is one that this class writes: columns of SQLite hold values of any type."""
        for table, kinds in _COLUMNS.items():
            wrong = " OR ".join(f"typeof({name}) != '{kind}'" for name, kind in kinds.items())
            if self._db.execute(f"SELECT 1 FROM {table} WHERE {wrong} LIMIT 1").fetchone():
                raise invalid("--data", _EXPECTED, f"{self.path}, with a row of {table} that is none of its own")
        if self._db.execute("PRAGMA foreign_key_check").fetchone():
            raise invalid("--data", _EXPECTED, f"{self.path}, with judgements of pairs that were not shown")
        known, rows = set(self._file.pairs), self._db.execute("SELECT DISTINCT pair FROM assignment")
        if any(pair not in known for (pair,) in rows) or self._db.execute(
            f"SELECT 1 FROM judgement WHERE choice NOT IN ({', '.join('?' * len(CHOICES))})", CHOICES
        ).fetchone():  # fmt: skip
            raise invalid("--data", _EXPECTED, f"{self.path}, with a pair or choice that does not exist")

    def place(self, rater: str) -> Place:
        """Where a rater goes on; a new one gets an order and sides of their own, which are stored."""
        rater = check_rater(rater)
        with self._change() as db:
            total = db.execute("SELECT COUNT(*) FROM assignment WHERE rater = ?", (rater,)).fetchone()[0]
            if not total:
                order = assign(list(self._file.pairs), rater, self.seed)
                rows = [(rater, position, pair, left) for position, (pair, left) in enumerate(order)]
                db.executemany("INSERT INTO assignment VALUES (?, ?, ?, ?)", rows)
                total = len(rows)
            row = db.execute(
                "SELECT position, pair, candidate_left FROM assignment a WHERE rater = ? AND NOT EXISTS (SELECT 1 FROM "
                "judgement j WHERE j.rater = a.rater AND j.position = a.position) ORDER BY position LIMIT 1",
                (rater,),
            ).fetchone()
        return Place(total, total, None, False) if row is None else Place(row[0], total, row[1], bool(row[2]))

    def judge(self, rater: str, position: int, choice: str) -> None:
        """Store a choice. Raises InvalidInputError for a pair that is judged already, as two windows do."""
        rater = check_rater(rater)
        if choice not in CHOICES:
            raise invalid("choice", f"one of {', '.join(CHOICES)}", repr(choice)[:80])
        with self._change() as db:
            known = db.execute(
                "SELECT 1 FROM assignment WHERE rater = ? AND position = ?", (rater, position)
            ).fetchone()
            judged = db.execute(
                "SELECT 1 FROM judgement WHERE rater = ? AND position = ?", (rater, position)
            ).fetchone()
            if not known or judged:
                raise invalid("position", "a pair of this rater that is not judged yet", position)
            db.execute(
                "INSERT INTO judgement (rater, position, choice, at) VALUES (?, ?, ?, ?)",
                (rater, position, choice, time.time()),
            )

    def undo(self, rater: str) -> bool:
        """Forget the rater's latest judgement; False when there is none."""
        rater = check_rater(rater)
        with self._change() as db:
            latest = "SELECT MAX(number) FROM judgement WHERE rater = ?"
            return db.execute(f"DELETE FROM judgement WHERE number = ({latest})", (rater,)).rowcount > 0

    def judgements(self) -> list[Judgement]:
        """All of them, oldest first."""
        with self._lock, self._explained():
            rows = self._db.execute(
                "SELECT j.rater, a.pair, a.candidate_left, j.choice FROM judgement j JOIN assignment a "
                "ON a.rater = j.rater AND a.position = j.position ORDER BY j.number"
            ).fetchall()
        return [Judgement(rater, pair, bool(left), choice) for rater, pair, left, choice in rows]


def assign(pairs: list[str], rater: str, seed: int) -> list[tuple[str, bool]]:
    """The order of a rater and, for half of the pairs, the candidate on the left; the same for the same arguments."""
    chance = random.Random(f"{seed}/{rater}")
    left = [index % 2 == 0 for index in range(len(pairs))]
    if len(pairs) % 2 and chance.random() < 0.5:
        left = [not side for side in left]
    chance.shuffle(left)
    order = list(pairs)
    chance.shuffle(order)
    return list(zip(order, left, strict=True))
