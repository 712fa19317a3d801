"""Does correcting the cache's errors pay? KL of one forward pass over real text, with and without each correction.

    python benchmarks/corrections.py --model smollm2-135m --preset turbo2 --text 0 --tokens 512 --out FILE

A query reads its own page and the sink exactly and earlier pages as their codes stand for, as the cache does; every
layer sees what the layers below made of it. The row without a correction stands first; `ratio` is paired, `ratio_se`
its standard error over blocks of 64 positions. `bits_added`: per value of K and V, what a page would store more.
"""

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from turboattention.calibration.capture import Captured
from turboattention.calibration.stored import PAGE, page_rows, stored_pages
from turboattention.evaluation.divergence import kl_divergence
from turboattention.evaluation.texts import BUNDLED_TEXTS, text_name, windows
from turboattention.integrations.models import load_model
from turboattention.policy import Policy
from turboattention.quant.codec import expand_pages
from turboattention.quant.layout import PageLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "turboattention_corrections"
ROWS = 256  # queries at once
OUTLIERS = 21  # of a page, 24 bits each (place and value): as many bits as a vector of 64 bytes


@dataclass
class Stored:
    """K or V of a layer: all ``[pages, kv_heads, page, head_dim]``; ``error`` is what the codes lack, 0 at the sink."""

    read: Tensor
    error: Tensor


Correction = Callable[[Stored, Stored, Tensor], None]  # K, V, mean squared query per page, head and channel


def _mean(side: Stored) -> Tensor:
    """The mean error of a page per channel, in 8 bits."""
    mean = side.error.mean(2, keepdim=True)
    unit = mean.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (mean / unit).round() * unit


def _outliers(side: Stored, weight: Tensor | None = None) -> Tensor:
    """The largest errors of a page; K's weighted by the size of queries."""
    size = side.error.abs() if weight is None else side.error.abs() * weight.sqrt().unsqueeze(2)
    kept = size.flatten(2).topk(OUTLIERS).indices
    mask = torch.zeros_like(size).flatten(2).scatter_(-1, kept, 1.0).view_as(size)
    return side.error * mask


def _nothing(key: Stored, value: Stored, power: Tensor) -> None: ...


def _mean_of_value(key: Stored, value: Stored, power: Tensor) -> None:
    value.read = value.read + _mean(value)


def _mean_of_key(key: Stored, value: Stored, power: Tensor) -> None:
    key.read = key.read + _mean(key)


def _outliers_of_value(key: Stored, value: Stored, power: Tensor) -> None:
    value.read = value.read + _outliers(value)


def _outliers_of_key(key: Stored, value: Stored, power: Tensor) -> None:
    key.read = key.read + _outliers(key, power)


@dataclass
class Setting:
    """What the attention function does next."""

    policy: Policy | None = None
    correct: Correction = _nothing
    # Of scores, half of their variance: per ``query`` or one per ``page``; ``+`` raises compressed tokens. Lowering is
    # right for errors that don't know the codes, raising for codes at the middle of what they stand for.
    bias: str = ""
    centred: str = ""  # ``key`` and/or ``value`` minus a fixed mean before rounding
    means: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # layer -> [kv_heads, head_dim], of another text
    learning: bool = False


SETTING = Setting()
# name -> (bits added per value at head_dim 64, correction, bias, centred)
VARIANTS: dict[str, tuple[float, Correction, str, str]] = {
    "none": (0.0, _nothing, "", ""),
    "mean error of V, 8 bits": (1 / 16, _mean_of_value, "", ""),
    "mean error of K, 8 bits": (1 / 16, _mean_of_key, "", ""),
    "21 outliers of V": (1 / 16, _outliers_of_value, "", ""),
    "21 outliers of K": (1 / 16, _outliers_of_key, "", ""),
    "bias of scores per query, lower": (0.0, _nothing, "query-", ""),
    "bias of scores per query, higher": (0.0, _nothing, "query+", ""),
    "bias of scores per page, lower": (1 / 512, _nothing, "page-", ""),
    "bias of scores per page, higher": (1 / 512, _nothing, "page+", ""),
    "K centred": (0.0, _nothing, "", "key"),
    "V centred": (0.0, _nothing, "", "value"),
}


def _stored(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K and V as read ``[kv_heads, tokens, head_dim]``, K's mean squared error and query power by page."""
    assert SETTING.policy is not None
    shift = {name: SETTING.means[layer][name] if name in SETTING.centred else None for name in ("key", "value")}
    moved = [
        x if shift[name] is None else x - shift[name][None, :, None]
        for name, x in (("key", key), ("value", value))
    ]  # fmt: skip
    key_rows, value_rows, sums = page_rows(Captured(query, *moved, 1.0))
    pages, heads = key_rows.shape[:2]
    seen = torch.arange(1, pages + 1)[:, None, None] * PAGE * (query.shape[1] // heads)
    formats = SETTING.policy.head_formats(layer, heads)
    stored = [torch.empty(key_rows.shape), torch.empty(value_rows.shape)]
    for pair in dict.fromkeys(formats):
        chosen = [head for head, found in enumerate(formats) if found == pair]
        layout = PageLayout(PAGE, key.shape[-1], *pair)
        codes = stored_pages(layout, *(x[:, chosen] for x in (key_rows, value_rows, sums)))
        for out, read in zip(stored, expand_pages(layout, codes), strict=True):
            out[:, chosen] = read
    errors = [exact.float() - read for exact, read in zip((key_rows, value_rows), stored, strict=True)]
    for error in errors:
        error[0, :, 0] = 0.0
    k, v = (Stored(*pair) for pair in zip(stored, errors, strict=True))
    SETTING.correct(k, v, sums / seen)
    variance = k.error.square().mean(2).transpose(0, 1)
    read = [side.read.transpose(0, 1).flatten(1, 2) for side in (k, v)]
    for number, name in enumerate(("key", "value")):
        if shift[name] is not None:
            read[number] += shift[name][:, None]
    return read[0], read[1], variance, (sums / seen).transpose(0, 1)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention of one row over the pages that ``SETTING`` makes."""
    layer, scale = int(module.layer_idx), query.shape[-1] ** -0.5  # type: ignore[arg-type]
    if SETTING.learning:
        SETTING.means[layer] = {"key": key[0].mean(1), "value": value[0].mean(1)}
    if SETTING.policy is None:
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    stored_key, stored_value, variance, power = _stored(layer, query, key, value)
    heads, tokens, dim = stored_key.shape
    q, exact_key, exact_value = query[0].view(heads, -1, tokens, dim), key[0], value[0]
    out = torch.empty_like(q)
    for first in range(0, tokens, ROWS):
        last = min(first + ROWS, tokens)
        part = q[:, :, first:last].flatten(1, 2)
        rows = torch.arange(first, last).repeat(q.shape[1])[:, None]
        columns = torch.arange(last)
        read = (columns // PAGE < rows // PAGE) & (columns > 0)
        scores = torch.where(read, part @ stored_key[:, :last].mT, part @ exact_key[:, :last].mT) * scale
        if SETTING.bias:  # E exp(s + e) = exp(s + var / 2)
            squares = part.square() if "query" in SETTING.bias else None
            half = 0.5 * scale**2 * (1 if "+" in SETTING.bias else -1)
            shift = squares @ variance.mT if squares is not None else (variance * power).sum(-1)[:, None]
            scores += torch.where(read, half * shift.repeat_interleave(PAGE, -1)[..., :last], 0.0)
        weights = scores.masked_fill_(columns > rows, -torch.inf).softmax(-1)
        found = (weights * read) @ stored_value[:, :last] + (weights * ~read) @ exact_value[:, :last]
        out[:, :, first:last] = found.unflatten(1, (-1, last - first))
    return out.view_as(query).transpose(1, 2).contiguous(), None


@torch.inference_mode()
def _logits(model: "PreTrainedModel", row: Tensor) -> Tensor:
    found: Tensor = model(input_ids=row, use_cache=False).logits
    return found


def main(
    out: Annotated[Path, typer.Option(help="CSV file to append to")],
    model: str = "smollm2-135m",
    preset: str = "turbo2",
    text: Annotated[int, typer.Option(help="number of the bundled text")] = 0,
    tokens: int = 512,
    only: Annotated[list[str] | None, typer.Option(help="names of corrections; default: all")] = None,
) -> None:
    """Append a row for each correction to OUT."""
    loaded = load_model(model)
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    loaded.model.set_attn_implementation(NAME)
    rows = windows(loaded.tokenizer, BUNDLED_TEXTS, tokens)[:, :-1]
    SETTING.learning = True
    _logits(loaded.model, rows[(text + 1) % len(rows)][None])
    SETTING.learning = False
    exact = _logits(loaded.model, rows[text][None])
    first: Tensor | None = None
    fresh = not out.exists()
    with out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(
                ("model", "preset", "text", "tokens", "correction", "bits_added", "kl", "ratio", "ratio_se")
            )
        for name in ["none", *(only or list(VARIANTS)[1:])]:
            bits, SETTING.correct, SETTING.bias, SETTING.centred = VARIANTS[name]
            SETTING.policy = Policy.from_preset(preset)
            kl = kl_divergence(exact, _logits(loaded.model, rows[text][None]))[0]
            SETTING.policy = None
            first = kl if first is None else first
            blocks = (kl - first).view(-1, PAGE).mean(1)
            error = blocks.std() / len(blocks) ** 0.5 / first.mean()
            writer.writerow((model, preset, text_name(BUNDLED_TEXTS[text]), tokens, name, f"{bits:.4f}",
                             f"{kl.mean():.6f}", f"{kl.mean() / first.mean():.3f}", f"{error:.3f}"))  # fmt: skip
            file.flush()
            print(name, f"{kl.mean() / first.mean():.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
