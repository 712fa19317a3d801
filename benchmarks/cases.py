"""The table: which cases are measured, under which names, and against what."""

from dataclasses import replace
from typing import NamedTuple

from turboattention.bench.case import Case


class Entry(NamedTuple):
    """A case and its baseline (see `turboattention.bench.run.measure_case`)."""

    case: Case
    against: str = "16-bit"


SHAPES = ((8, 32768), (64, 8192), (32, 8192), (1, 8192), (1, 32768), (1, 131072), (64, 2048), (1, 4096))
QUICK = ((8, 32768), (1, 8192))
EXTREMES = ((1024, 1024), (1, 1 << 20))
FORMS = {
    "4 bits": ("turbo4", "turbo4-unrefined"),
    "2 bits": ("turbo2", "turbo2-unrefined"),
    "K4/V2": ("turbo4-v2", "turbo4-unrefined-v2"),
}


def table(quick: bool = False) -> dict[str, list[Entry]]:
    """Groups of entries by name; ``quick`` keeps the few that say most."""
    decode = Case("decode")
    shapes = QUICK if quick else SHAPES
    found: dict[str, list[Entry]] = {}
    for title, forms in FORMS.items():
        found[f"decode {title}"] = [
            Entry(replace(decode, batch=b, tokens=t, form=form)) for form in forms for b, t in shapes
        ]
    models = (
        replace(decode, query_heads=64),
        replace(decode, query_heads=24, head_dim=64),
        replace(decode, head_dim=256),
    )
    found["decode other heads"] = [
        Entry(replace(shape, batch=b, tokens=t, form=form))
        for shape in models
        for form in ("turbo4", "turbo2")
        for b, t in ((8, 32768),)
    ]
    found["decode portable"] = [
        Entry(replace(decode, batch=64, tokens=8192, form=form, implementation="triton"))
        for form in ("turbo4", "turbo2")
    ]
    ragged = replace(decode, batch=32, tokens=32768, ragged=True)
    found["decode extremes"] = [Entry(replace(decode, batch=b, tokens=t)) for b, t in EXTREMES]
    found["decode ragged"] = [Entry(ragged, "even batch"), Entry(ragged)]
    found["decode page order"] = [
        Entry(replace(decode, batch=8, tokens=32768, form=form), "contiguous pages") for form in ("turbo4", "turbo2")
    ]
    append = Case("append", tokens=32768)
    found["append"] = [
        Entry(replace(append, batch=batch, form=form), against)
        for form in ("turbo4", "turbo2")
        for batch in (1, 8)
        for against in ("decode step", "16-bit")
    ]
    prefill = Case("prefill")
    found["prefill"] = [
        Entry(replace(prefill, tokens=tokens, causal=causal))
        for tokens in ((16384,) if quick else (4096, 16384, 32768))
        for causal in (True, False)
    ]
    found["prefill long"] = [Entry(replace(prefill, tokens=131072, causal=causal)) for causal in (True, False)]
    found["prefill 64 channels"] = [
        Entry(replace(prefill, head_dim=64, tokens=16384, causal=causal)) for causal in (True, False)
    ]
    return named(found)


def named(groups: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """The groups, every case with the name of its own."""
    return {name: [Entry(replace(e.case, name=name), e.against) for e in entries] for name, entries in groups.items()}
