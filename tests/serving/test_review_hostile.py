"""A data file of a review that somebody else made: a damaged page, rows of other types, code in the schema."""

import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="scipy is not installed (extra 'review')")

from turboattention.errors import InvalidInputError
from turboattention.serving.review.analyse import analyse
from turboattention.serving.review.pairs import Pair, PairFile
from turboattention.serving.review.store import Store

PAIRS = PairFile({f"p{i}": Pair(f"p{i}", "q", "b", "c") for i in range(6)}, ())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "review.sqlite"
    with Store(path, PAIRS, 0) as store:
        for rater in ("Ann", "Bob"):
            store.place(rater)
            for position in range(3):
                store.judge(rater, position, "left")
    return path


def use(path: Path) -> None:
    with Store(path, PAIRS, 0) as store:
        for rater in ("Ann", "New"):
            place = store.place(rater)
            assert place.pair is None or place.pair in PAIRS.pairs
        analyse(PAIRS, store.judgements(), "pairs", 0)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE assignment SET pair = 'none such' WHERE rater = 'Ann' AND position = 0",
        "UPDATE assignment SET pair = NULL",
        "UPDATE assignment SET candidate_left = 'x'",
        "UPDATE assignment SET candidate_left = NULL", "UPDATE assignment SET rater = x'ff' WHERE rater = 'Ann'",
        "UPDATE assignment SET rater = CAST(x'ff' AS TEXT) WHERE rater = 'Ann'",
        "UPDATE assignment SET position = 'first' WHERE position = 0",
        "UPDATE judgement SET rater = NULL",
        "UPDATE judgement SET choice = 'none such'", "UPDATE judgement SET choice = NULL",
        "UPDATE review SET schema = 'x'", "UPDATE review SET pairs = NULL", "UPDATE review SET seed = 1e300",
        "DROP TABLE assignment; CREATE TABLE assignment (other)",
        "DROP TABLE judgement; CREATE TABLE judgement (rater)",
        "DROP TABLE review; CREATE TABLE review (x)", "CREATE VIEW v AS SELECT 1", "CREATE TABLE more (x)",
        "CREATE TRIGGER t AFTER INSERT ON judgement BEGIN DELETE FROM judgement; END",
        # A view that never ends where a table is expected.
        "DROP TABLE assignment; CREATE VIEW assignment AS WITH RECURSIVE c(rater) AS (SELECT 1 UNION ALL SELECT "
        "rater + 1 FROM c) SELECT rater, 0 AS position, 'p0' AS pair, 1 AS candidate_left FROM c",
    ],
)  # fmt: skip
def test_what_this_program_does_not_write_is_refused(data: Path, statement: str) -> None:
    with closing(sqlite3.connect(data)) as database:
        database.executescript(f"PRAGMA foreign_keys = OFF; {statement};")
    start = time.perf_counter()
    with pytest.raises(InvalidInputError, match="--data: expected"):
        use(data)
    assert time.perf_counter() - start < 5


def test_damaged_files(data: Path) -> None:
    """Random bytes over a valid file: it is refused, or what it gives is of the kinds that it should be."""
    whole, chance = data.read_bytes(), random.Random(0)
    use(data)
    refused = 0
    for number in range(80):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 4, 64))):
            content[chance.randrange(len(content))] = chance.randrange(256)
        if number % 4 == 0:
            content = content[: chance.randrange(len(content))]
        data.write_bytes(content)
        try:
            use(data)
        except InvalidInputError:
            refused += 1
    assert refused > 20
