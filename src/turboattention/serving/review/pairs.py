"""Pairs of answers from JSON lines, as ``turboattention ab`` writes them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turboattention.errors import InvalidInputError, invalid
from turboattention.files import RECORDS, parse_json, read_bytes
from turboattention.serving.answer import SIDES
from turboattention.serving.prompts import has_halves
from turboattention.typed import short


@dataclass(frozen=True)
class Pair:
    """One sample: what was asked, and both answers."""

    id: str
    prompt: str
    baseline: str
    candidate: str


@dataclass(frozen=True)
class PairFile:
    """pairs: by id, in the order of the file. bad_lines: what was left out and why, by number."""

    pairs: dict[str, Pair]
    bad_lines: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Tells another set of pairs from this one."""
        rows = [[pair.id, pair.prompt, pair.baseline, pair.candidate] for pair in self.pairs.values()]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_pairs(path: Path) -> PairFile:
    """Lines ``{"id", "prompt", "baseline": {"text"}, "candidate": {"text"}}``; other keys are for others.

    Malformed lines are left out and named in ``bad_lines``. Raises InvalidInputError for a file that cannot be read, an
    id that two good lines have, and a file without a good line.
    """
    lines = read_bytes("pairs", path, RECORDS, "a readable file of JSON lines").split(b"\n")
    pairs: dict[str, Pair] = {}
    numbers: dict[str, int] = {}
    bad = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = _pair(parse_json(line))
        except ValueError as error:
            reason = "not JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)
            bad.append(f"line {number}: {reason}")
            continue
        if pair.id in pairs:
            raise invalid(f"{path}: id", "each once", f"{pair.id!r} in lines {numbers[pair.id]} and {number}")
        pairs[pair.id], numbers[pair.id] = pair, number
    if not pairs:
        raise InvalidInputError(f"{path}: expected at least one pair, received {'; '.join(bad[:3]) or 'an empty file'}")
    return PairFile(pairs, tuple(bad))


def _pair(row: Any) -> Pair:
    if not isinstance(row, dict):
        raise invalid("pair", "an object", type(row).__name__)
    answers = {side: row.get(side) for side in SIDES}
    texts = {side: answer.get("text") if isinstance(answer, dict) else None for side, answer in answers.items()}
    pair = Pair(
        _text("id", row.get("id")), _text("prompt", row.get("prompt")),
        *(_text(f"{side}.text", text) for side, text in texts.items()),
    )  # fmt: skip
    if not pair.id:
        raise invalid("id", "text that is not empty", "''")
    return pair


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(name, "text", short(value))
    if has_halves(value):
        raise invalid(name, "Unicode text", "half of a surrogate pair")
    return value


def check_same_pairs(fingerprint: str, path: Path) -> None:
    """Raise InvalidInputError unless the pairs in ``path`` are those with this fingerprint."""
    if read_pairs(path).fingerprint != fingerprint:
        raise invalid("review", f"judgements of the pairs in {path}", "those of other pairs")
