"""A PlanResult as tables in the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from turboattention.planning.result import FormPlan, Gain, PlanResult, Speed
from turboattention.report.words import printable

_GIB, _KIB = 2**30, 2**10
_BASELINE = "bf16"


def print_plan(result: PlanResult, console: Console) -> None:
    """Sizes, speeds at one batch and at each largest batch, gains over a grid, then the notes."""
    cards = f"{result.cards} x " if result.cards > 1 else ""
    console.print(
        Text(
            f"{printable(result.model)} · {result.parameters / 1e9:.2f}e9 parameters, {result.compressed_layers} of "
            f"{result.layers} layers compressed, {result.kv_heads} KV heads of {result.head_dim} · "
            f"{cards}{printable(result.gpu)}: weights {result.weight_bytes / _GIB:.1f} GiB, room for the cache "
            f"{result.free_bytes / _GIB:.1f} GiB",
            style="bold",
        )
    )
    requests = f"prompts of {result.prompt:,} tokens, answers of {result.output:,}"
    console.print(Text(f"\nSizes: {requests}; longest context of each of {result.batch}"))
    console.print(_sizes(result))
    served = [form for form in result.forms if form.runs_in == "vLLM"]
    if any(form.own for form in served):
        console.print(Text(f"Speed at a batch of {result.batch}: {requests}"))
        console.print(_speeds(served, [form.same for form in served]))
        console.print(Text(f"Speed of each at its largest batch, at most {result.max_batch}"))
        console.print(_speeds(served, [form.own for form in served]))
    if result.gains:
        others = "bf16 / fp8" if _has_fp8(result) else "bf16"
        console.print(Text(f"Steps by batch and context: how many times {result.candidate} is as fast as {others}"))
        console.print(Text("(alone: the other does not fit; -: neither fits)"))
        console.print(_gains(result))
    for note in result.notes:
        console.print(Text(f"- {note}"))
    for source in result.sources:
        console.print(Text(f"  measured: {source}", style="dim"))


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left")
    return table


def _sizes(result: PlanResult) -> Table:
    table = _table(
        "cache", "in", "bits a value", "KiB a token", "GiB a sequence", "smaller", "largest batch", "longest context"
    )
    baseline = next(form for form in result.forms if form.name == _BASELINE)
    for form in result.forms:
        table.add_row(
            form.name, form.runs_in, f"{form.bits_per_value:.2f}", f"{form.token_bytes / _KIB:.2f}",
            f"{form.sequence_bytes / _GIB:.3f}", f"{baseline.sequence_bytes / form.sequence_bytes:.2f}x",
            f"{form.largest_batch:,}", f"{form.largest_context:,}",
        )  # fmt: skip
    return table


def _speeds(forms: list[FormPlan], speeds: list[Speed | None]) -> Table:
    table = _table("cache", "batch", "ms a token", "bound by", "first token", "tokens/s", "$ / 1e6", "kWh / 1e6")
    for form, speed in zip(forms, speeds, strict=True):
        if speed is None:
            table.add_row(form.name, "-", form.why_no_speed or "does not fit", *["-"] * 5)
            continue
        dollars = speed.dollars_per_million
        table.add_row(
            form.name, str(speed.batch), f"{speed.ms_per_token:.2f}", speed.bound, f"{speed.first_token_ms:,.0f} ms",
            f"{speed.tokens_per_s:,.0f}", "-" if dollars is None else f"{dollars:.3f}", f"{speed.kwh_per_million:.3f}",
        )  # fmt: skip
    return table


def _has_fp8(result: PlanResult) -> bool:
    return any(gain.against_fp8 for gain in result.gains)


def _gains(result: PlanResult) -> Table:
    contexts = sorted({gain.context for gain in result.gains})
    table = _table("batch", *(f"{context:,}" for context in contexts))
    for batch in sorted({gain.batch for gain in result.gains}):
        cells = {gain.context: gain for gain in result.gains if gain.batch == batch}
        table.add_row(str(batch), *(_cell(cells[context], _has_fp8(result)) for context in contexts))
    return table


def _cell(gain: Gain, has_fp8: bool) -> str:
    if not gain.fits:
        return "-"
    ratios = (gain.against_bf16, gain.against_fp8) if has_fp8 else (gain.against_bf16,)
    return " / ".join("alone" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
