"""Which tokens a calibration reads: windows for sensitivities, for tuning, and held out for every reported number."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboattention.errors import invalid
from turboattention.evaluation.texts import encode, leading_tokens, load_text, text_name, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SKIP = 256  # as `evaluation.texts`: title pages and headers
HELD_OUT_SHARE = 0.45  # of each text at its beginning, so that windows hardly ever depend on how much of it is read
TUNING_SHARE = 4  # each fourth window
LEAST_WINDOWS = 2


@dataclass(frozen=True)
class Plan:
    """int64 ``[rows, tokens + 1]`` each; no token of one is in another.

    sensitivity: for gradients; tuning: to find the policy that meets the target; held_out: for what is reported.
    """

    sensitivity: Tensor
    tuning: Tensor
    held_out: Tensor
    held_out_names: list[str]


def make_plan(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str | Path],
    held_out: Sequence[str | Path],
    tokens: int,
    window: int,
    held_out_tokens: int,
    context_length: int | None = None,
) -> Plan:
    """Cut windows in turn from all texts, ``tokens`` tokens in all (fewer where the texts end).

    held_out: other texts; when empty, the beginning of each text is held out (the very window that `compare` measures),
    and calibration reads the rest, from 45 % of the text on.
    """
    if not texts:
        raise invalid("texts", "at least one text", "none")
    for name, size in (("window", window), ("held-out tokens", held_out_tokens)):
        if size < 128 or size % 64:
            raise invalid(name, "a multiple of 64, at least 128", size)
    if tokens < LEAST_WINDOWS * window:
        raise invalid("tokens", f"at least {LEAST_WINDOWS} windows of {window}", tokens)
    both = {Path(x).resolve() for x in texts} & {Path(x).resolve() for x in held_out}
    if both:
        raise invalid("held-out texts", "other texts than those of the calibration", ", ".join(x.name for x in both))
    kept = windows(tokenizer, held_out or texts, held_out_tokens, context_length)
    start = leading_tokens(tokenizer)
    step = window + 1 - len(start)
    queues = []
    for text in texts:
        ids = encode(tokenizer, load_text(text))
        begin = _SKIP if held_out else max(_SKIP + held_out_tokens + 1, int(HELD_OUT_SHARE * len(ids)))
        queues.append([start + ids[i : i + step] for i in range(begin, len(ids) - step + 1, step)])
    wanted = tokens // window
    found: list[list[int]] = []
    while len(found) < wanted and any(queues):
        for queue in queues:
            if queue and len(found) < wanted:
                found.append(queue.pop(0))
    if len(found) < LEAST_WINDOWS:
        names = ", ".join(map(text_name, texts))
        raise invalid("texts", f"at least {LEAST_WINDOWS} windows of {window} tokens besides the held-out ones", names)
    tuning = found[TUNING_SHARE - 1 :: TUNING_SHARE] or found[-1:]
    sensitivity = [x for x in found if not any(x is y for y in tuning)]
    return Plan(torch.tensor(sensitivity), torch.tensor(tuning), kept, _distinct(list(held_out or texts)))


def _distinct(texts: Sequence[str | Path]) -> list[str]:
    names = [text_name(text) for text in texts]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]
