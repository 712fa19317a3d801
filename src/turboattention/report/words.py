"""Which words of two texts differ, and untrusted text made safe to show."""

import re
import unicodedata
from difflib import SequenceMatcher
from typing import NamedTuple

_BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # reorder the text around them


class Piece(NamedTuple):
    """A run of text with its white space; ``differs`` when the other text does not have it here."""

    text: str
    differs: bool


def printable(text: str) -> str:
    """``text`` with control characters replaced, so that a model cannot steer the terminal; new lines and tabs stay."""
    return "".join(c if c in "\n\t" or not _controls(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def markdown_text(text: str) -> str:
    """One line without what Markdown or HTML would take for its own: text of others must not become markup."""
    flat = " ".join(printable(text).split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#&!" else c for c in flat)


def _controls(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _BIDIRECTIONAL


def mark_differences(left: str, right: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts cut into pieces that join to the text again."""
    a, b = _words(left), _words(right)
    matcher = SequenceMatcher(None, [word.strip() for word in a], [word.strip() for word in b], autojunk=False)
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    for tag, a_from, a_to, b_from, b_to in matcher.get_opcodes():
        for side, words in ((0, a[a_from:a_to]), (1, b[b_from:b_to])):
            pieces[side].extend(_pieces("".join(words), tag != "equal"))
    return pieces


def _words(text: str) -> list[str]:
    """Words with the white space before them, and the white space at the end."""
    return re.findall(r"\s*\S+|\s+$", printable(text))


def _pieces(text: str, differs: bool) -> list[Piece]:
    """The white space before a difference is no difference."""
    start = len(text) - len(text.lstrip())
    return [piece for piece in (Piece(text[:start], False), Piece(text[start:], differs)) if piece.text]
