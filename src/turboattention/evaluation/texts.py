"""The texts of a comparison and the windows of tokens cut from them."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboattention.errors import invalid
from turboattention.files import RECORDS, read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prose without line breaks, prose with dialogue, and code; sources and licences in data/LICENSES.md.
BUNDLED_TEXTS = ("state-of-the-union-1981", "persuasion", "python-code")
_SKIP = 256  # tokens of a title page or header, left out when the text is long enough


def load_text(name_or_path: str | Path) -> str:
    """A bundled text by its name, or a UTF-8 file."""
    name = str(name_or_path)
    if name in BUNDLED_TEXTS:
        return (resources.files("turboattention.evaluation") / "data" / f"{name}.txt").read_text(encoding="utf-8")
    path = Path(name_or_path)
    if not path.is_file():
        raise invalid("text", f"one of {', '.join(BUNDLED_TEXTS)} or a text file", repr(name))
    content = read_bytes("text", path, RECORDS, "a readable text file")
    try:
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")  # lines end as in a text file
    except UnicodeDecodeError as error:
        raise invalid("text", "a UTF-8 text file", f"{name!r} ({error.reason} at byte {error.start})") from error


def text_name(name_or_path: str | Path) -> str:
    """How tables call the text."""
    return str(name_or_path) if str(name_or_path) in BUNDLED_TEXTS else Path(name_or_path).name


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token numbers of ``text`` without anything added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token that this tokenizer puts before every text, if any: some models fail without it."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []


def windows(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str | Path],
    tokens: int,
    context_length: int | None = None,
) -> Tensor:
    """One window of ``tokens + 1`` token numbers of each text: ``tokens`` are fed and as many predictions are scored.

    Returns int64 ``[len(texts), tokens + 1]``.
    """
    if not texts:
        raise invalid("texts", "at least one text", "none")
    if tokens < 1:
        raise invalid("tokens", "at least 1", tokens)
    if context_length is not None and tokens + 1 > context_length:
        raise invalid("tokens", f"at most {context_length - 1} (the model's context is {context_length})", tokens)
    start = leading_tokens(tokenizer)
    return torch.tensor([start + _window(tokenizer, text, tokens + 1 - len(start)) for text in texts])


def _window(tokenizer: "PreTrainedTokenizerBase", text: str | Path, length: int) -> list[int]:
    ids = encode(tokenizer, load_text(text))
    if len(ids) < length:
        raise invalid(f"text {text_name(text)}", f"at least {length} tokens", f"{len(ids)} tokens")
    skipped = min(_SKIP, len(ids) - length)
    return ids[skipped : skipped + length]
