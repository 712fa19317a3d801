"""The figures of a comparison in the order of every table: label, meaning, and how a value is written."""

from collections.abc import Callable
from dataclasses import dataclass

from turboattention.evaluation.result import BaselineResult, CandidateResult, Interval

BASELINE = "16-bit"


@dataclass(frozen=True)
class Value:
    """A number as text, and its 95 % interval where there is one."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    label: name with unit.
    meaning: one or two sentences for readers who do not work on language models.
    baseline, candidate: write the value; a baseline has none for figures that compare with it.
    """

    label: str
    meaning: str
    baseline: Callable[[BaselineResult], Value | None]
    candidate: Callable[[CandidateResult], Value]


def size(number: int) -> str:
    """Bytes in the largest binary unit that keeps a digit before the point."""
    amount = float(number)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.2f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


def small(number: float) -> str:
    """Four decimals, or two significant digits below them: a KL of 3e-7 must not read as zero."""
    return f"{number:.4f}" if number == 0 or abs(number) >= 0.001 else f"{number:.1e}"


def _interval(interval: Interval, write: Callable[[float], str], unit: str = "") -> str:
    return f"{write(interval.low)} to {write(interval.high)}{unit}"


def _two(number: float) -> str:
    return f"{number:.2f}"


def _percent(number: float) -> str:
    return f"{100 * number:.2f}"


def _signed(number: float) -> str:
    return small(number) if number < 0 else f"+{small(number)}"


def _per_second(number: float) -> str:
    return f"{number:,.0f}"


def _milliseconds(number: float) -> str:
    return f"{number:.1f}"


FIGURES = (
    Figure(
        "KV cache",
        "Memory that the model keeps for the text read so far, every byte counted: codes, scales, exact tokens and "
        "open pages. For the baseline: 2 bytes a value.",
        lambda b: Value(size(b.kv_bytes)),
        lambda c: Value(size(c.kv_bytes)),
    ),
    Figure(
        "Bits per value",
        "The cache's bytes times 8, divided by the numbers stored in it. Scales and exact tokens are in it, so a 4-bit "
        "preset lies above 4.",
        lambda b: Value("16.00"),
        lambda c: Value(_two(c.bits_per_value)),
    ),
    Figure(
        "Compression",
        "How many times smaller the cache is than with 16 bits a value.",
        lambda b: Value("1.00x"),
        lambda c: Value(f"{c.compression:.2f}x"),
    ),
    Figure(
        "Perplexity",
        "How surprised the model is by the real next token; lower is better, and 20 means as unsure as a choice among "
        "20 equally likely tokens. Its interval is wide because texts vary; judge the change by the next row.",
        lambda b: Value(_two(b.perplexity), _interval(b.perplexity_ci, _two)),
        lambda c: Value(_two(c.perplexity), _interval(c.perplexity_ci, _two)),
    ),
    Figure(
        "Added nats per token",
        "The loss of quality: change of the mean logarithm of perplexity, on the same tokens. 0.01 is about 1 % more "
        "perplexity. Where the interval holds zero, this text shows no loss that can be told from chance.",
        lambda b: None,
        lambda c: Value(_signed(c.delta_nll), _interval(c.delta_nll_ci, small)),
    ),
    Figure(
        "KL divergence, nats",
        "How far the predicted probabilities of all next tokens move away from the baseline's, mean over positions; "
        "0 means identical. It sees changes that perplexity averages out.",
        lambda b: None,
        lambda c: Value(small(c.kl_mean), _interval(c.kl_ci, small)),
    ),
    Figure(
        "Same top token",
        "Share of positions where the most likely next token is the baseline's.",
        lambda b: None,
        lambda c: Value(f"{_percent(c.top1_agreement)} %", _interval(c.top1_ci, _percent, " %")),
    ),
    Figure(
        "Prefill, tokens/s",
        "Speed of reading a prompt on this machine.",
        lambda b: Value(_per_second(b.prefill_tokens_per_s)),
        lambda c: Value(_per_second(c.prefill_tokens_per_s)),
    ),
    Figure(
        "Decode, ms/token",
        "Time to write one token on this machine; lower is better. Where no fused kernel fits the machine (see "
        "turboattention doctor), the plain PyTorch definition runs, which is slower than ordinary attention: such a "
        "run measures size and quality, and its times say nothing about a kernel.",
        lambda b: Value(_milliseconds(b.decode_ms_per_token)),
        lambda c: Value(_milliseconds(c.decode_ms_per_token)),
    ),
)


def summary(candidate: CandidateResult) -> str:
    """The finding on one candidate in one sentence."""
    low, high = candidate.delta_nll_ci
    if low > 0:
        loss = f"quality falls by {small(candidate.delta_nll)} nats per token"
    elif high < 0:
        loss = f"this text comes out {small(-candidate.delta_nll)} nats per token better, others may not"
    else:
        loss = "no loss of quality can be told from zero on this text"
    return (
        f"The cache takes {candidate.bits_per_value:.2f} bits per value, {candidate.compression:.2f} times less than "
        f"16-bit; {loss}; the most likely token stays the same at {_percent(candidate.top1_agreement)} % of positions."
    )
