"""The table of a CPU: what `run.py --device cpu` measures. Batch 1, as on a machine with a few cores."""

from dataclasses import replace

from cases import Entry, named

from turboattention.bench.case import Case

FORMS = ("turbo4", "turbo4-unrefined", "turbo3", "turbo2", "turbo2-unrefined", "int8")
LAYERS = {
    "32 / 8 heads of 128": (Case("decode"), (4096, 16384)),
    "9 / 3 heads of 64": (Case("decode", query_heads=9, kv_heads=3, head_dim=64), (4096, 8192)),
}


def cpu_table(quick: bool = False) -> dict[str, list[Entry]]:
    """Groups of entries by name; ``quick`` keeps the few that say most."""
    found: dict[str, list[Entry]] = {}
    for title, (layer, lengths) in LAYERS.items():
        found[f"decode {title}"] = [
            Entry(replace(layer, tokens=tokens, form=form))
            for tokens in (lengths[-1:] if quick else lengths)
            for form in (FORMS[:2] if quick else FORMS)
        ]
    append = Case("append", tokens=4096)
    found["append"] = [
        Entry(replace(append, form=form), against)
        for form in ("turbo4", "turbo2")
        for against in ("decode step", "16-bit")
    ]
    found["prefill 32 / 8 heads of 128"] = [
        Entry(Case("prefill", tokens=4096, causal=causal)) for causal in ((True,) if quick else (True, False))
    ]
    small = Case("prefill", query_heads=9, kv_heads=3, head_dim=64)
    found["prefill 9 / 3 heads of 64"] = [
        Entry(replace(small, tokens=tokens)) for tokens in ((4096,) if quick else (512, 4096))
    ]
    return named(found)
