"""Marking of differing words, and text made safe to show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboattention.report.words import mark_differences, printable

TEXTS = st.text(st.sampled_from("ab \n\t"), max_size=30)


@given(TEXTS, TEXTS)
def test_pieces_join_to_the_texts(left: str, right: str) -> None:
    for text, pieces in zip((left, right), mark_differences(left, right), strict=True):
        assert "".join(piece.text for piece in pieces) == text


@given(TEXTS)
def test_a_text_does_not_differ_from_itself(text: str) -> None:
    for pieces in mark_differences(text, text):
        assert not any(piece.differs for piece in pieces)


def test_the_differing_word_is_marked_without_its_space() -> None:
    left, right = mark_differences("a bright cold day", "a bright warm day")
    assert [piece.text for piece in left if piece.differs] == ["cold"]
    assert [piece.text for piece in right if piece.differs] == ["warm"]


@pytest.mark.parametrize("text", ["\x1b[2J", "\x00", "\x9b1m", "\u202eabc", "\ud800", "\r"])
def test_control_characters_are_replaced(text: str) -> None:
    assert text[0] not in printable(text)
    assert len(printable(text)) == len(text)


@pytest.mark.parametrize("text", ["naïve café", "日本語", "a\u00a0b", "tab\tand\nline", "👩\u200d🔬"])
def test_other_text_stays(text: str) -> None:
    assert printable(text) == text
