"""More bits for layers that need them, as a policy for new requests."""

from collections.abc import Sequence
from dataclasses import replace

from turboattention.policy import Override, Policy

NEXT = {2: 4, 3: 4, 4: 8, 8: 16}


def raised(policy: Policy, layers: Sequence[int], kv_heads: int) -> Policy:
    """``policy`` with the next level of bits (2 and 3: 4, 4: 8, 8: 16) for K and V of each head of ``layers``.

    Layers that are at 16 bits already stay as they are.
    """
    more: list[Override] = []
    for layer in layers:
        formats = policy.head_formats(layer, kv_heads)
        sides = {"key": [key.bits for key, _ in formats], "value": [value.bits for _, value in formats]}
        if len({bits for side in sides.values() for bits in side}) == 1:
            bits = sides["key"][0]
            more += [Override(NEXT[bits], layer)] if bits in NEXT else []
            continue
        for tensor, each in sides.items():
            more += [Override(NEXT[b], layer, head, tensor) for head, b in enumerate(each) if b in NEXT]  # type: ignore[arg-type]  # key or value
    return _with(policy, more, layers)


def exact(policy: Policy, layers: Sequence[int]) -> Policy:
    """``policy`` with whole layers at 16 bits: all that engines with one page size can do."""
    known = {o.layer for o in policy.overrides if o.bits == 16 and o.head is None and o.tensor == "both"}
    return _with(policy, [Override(16, layer) for layer in layers if layer not in known], layers)


def _with(policy: Policy, more: list[Override], layers: Sequence[int]) -> Policy:
    if not more:
        return policy
    before = policy.provenance.get("raised_layers", [])
    provenance = {**policy.provenance, "raised_layers": sorted({*before, *layers})}
    name = policy.name if policy.name.endswith(", raised") else f"{policy.name}, raised"
    return replace(policy, name=name, overrides=(*policy.overrides, *more), provenance=provenance)
