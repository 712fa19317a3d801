"""Bundled texts and the windows cut from texts."""

from importlib import resources
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from turboattention.errors import InvalidInputError
from turboattention.evaluation.texts import BUNDLED_TEXTS, load_text, text_name, windows


@pytest.mark.parametrize("name", BUNDLED_TEXTS)
def test_bundled_texts_are_long_enough_and_licensed(name: str) -> None:
    """About 9,000 tokens need 40 kB; the counts of real tokenisers are in the slow tests."""
    text = load_text(name)
    assert 40_000 <= len(text) <= 60_000
    assert text.isascii()
    assert text_name(name) == name
    licences = (resources.files("turboattention.evaluation") / "data" / "LICENSES.md").read_text(encoding="utf-8")
    assert f"`{name}.txt`" in licences


def test_windows_skip_the_title_page_when_they_can(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = "".join(chr(97 + index % 26) for index in range(1000))
    path = tmp_path / "letters.txt"
    path.write_text(text, encoding="utf-8")
    for tokens, skipped in ((100, 256), (743, 256), (744, 255), (999, 0)):
        rows = windows(tokenizer, [path], tokens)
        assert rows.dtype == torch.int64
        assert rows.shape == (1, tokens + 1)
        assert tokenizer.decode(rows[0]) == text[skipped : skipped + tokens + 1]


def test_one_row_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = windows(tokenizer, BUNDLED_TEXTS, 512)
    assert rows.shape == (3, 513)
    for row, name in zip(rows, BUNDLED_TEXTS, strict=True):
        assert tokenizer.decode(row) in load_text(name)


def test_leading_token_is_kept(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    """Models whose tokeniser puts a token before every text get it before every window."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<eos>", unk_token="<unk>"
    )
    plain = windows(tokenizer, [text_file], 100)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    led = windows(tokenizer, [text_file], 100)
    assert plain[0, 0] != 1
    assert led.shape == plain.shape
    assert led[0, 0] == 1
    assert torch.equal(led[0, 1:], plain[0, :-1])


def test_bad_input(tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path) -> None:
    found = len(text_file.read_text(encoding="utf-8"))
    with pytest.raises(
        InvalidInputError, match=rf"text text.txt: expected at least {found + 1} tokens, received {found}"
    ):
        windows(tokenizer, [text_file], found)
    with pytest.raises(
        InvalidInputError, match=r"tokens: expected at most 511 \(the model's context is 512\), received 512"
    ):
        windows(tokenizer, [text_file], 512, context_length=512)
    assert windows(tokenizer, [text_file], 511, context_length=512).shape == (1, 512)
    with pytest.raises(InvalidInputError, match=r"one of state-of-the-union-1981, .* received 'nothing\.txt'"):
        load_text("nothing.txt")
    with pytest.raises(InvalidInputError, match="texts: expected at least one"):
        windows(tokenizer, [], 10)
    with pytest.raises(InvalidInputError, match="tokens: expected at least 1"):
        windows(tokenizer, [text_file], 0)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"abc\xff\xfe")
    with pytest.raises(InvalidInputError, match=r"expected a UTF-8 text file, received .*byte 3"):
        load_text(binary)
