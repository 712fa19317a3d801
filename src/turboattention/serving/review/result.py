"""What a review found, as plain data."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turboattention.errors import InvalidInputError, invalid
from turboattention.files import DOCUMENT, read_json
from turboattention.serving.result import Measured
from turboattention.typed import build

SCHEMA = 1


@dataclass(frozen=True)
class Counts:
    """Judgements by what they said about the sides."""

    candidate: int
    baseline: int
    tie: int
    both_bad: int

    @property
    def total(self) -> int:
        return self.candidate + self.baseline + self.tie + self.both_bad


@dataclass(frozen=True)
class ReviewResult:
    """A review so far.

    pairs, judged: of the file, and those that somebody judged. raters: counts by name.
    preferred: share of the candidate among judgements with a winner, one vote a pair (its majority), Wilson's interval.
    net: mean over pairs of (candidate wins - baseline wins) / judgements, bootstrap over pairs.
    not_worse: share of pairs whose majority is not for the baseline, Wilson's interval.
    both_bad: share of judgements. sign_p: two-sided test of as many pairs for either side.
    agreement: Krippendorff's alpha of the four labels over pairs with two raters or more, bootstrap over pairs; None
        without such pairs or where all labels are alike.
    left: share of the left side among judgements with a winner, Wilson's interval; far from 0.5 says that the place of
        an answer decides.
    source, fingerprint: name and content of the pairs.
    """

    pairs: int
    judged: int
    counts: Counts
    raters: dict[str, Counts]
    preferred: Measured | None
    net: Measured | None
    not_worse: Measured | None
    both_bad: float
    sign_p: float | None
    agreement: Measured | None
    left: Measured | None
    bad_lines: tuple[str, ...]
    source: str
    fingerprint: str
    seed: int
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data = asdict(self)
        return {"schema": data.pop("schema"), **data}

    @classmethod
    def load(cls, path: Path) -> "ReviewResult":
        """What ``review --results --json`` wrote; raises InvalidInputError for anything else."""
        expected = "the JSON of turboattention review --results"
        data = read_json("review", path, DOCUMENT, expected)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise invalid("review", expected, f"{path}, of another schema than {SCHEMA}")
        try:
            return build(cls, data, "review")
        except InvalidInputError as error:
            raise invalid("review", expected, f"{path} ({error})") from error
