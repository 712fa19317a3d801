"""The numbers of a check against plain arithmetic, and what is kept for it."""

import gc
import json
from pathlib import Path

import pytest
import torch
from caches import filled, normal, policy_of

from turboattention.calibration.observe import LayerStatistics
from turboattention.calibration.state import State
from turboattention.errors import InvalidInputError
from turboattention.monitoring import shadow
from turboattention.monitoring.codes import code_rates
from turboattention.monitoring.kept import CHUNK_TOKENS, Budget, Kept
from turboattention.monitoring.reference import Reference, expected_errors
from turboattention.monitoring.settings import WatchSettings
from turboattention.quant.codec import encode_pages, expand_pages
from turboattention.quant.layout import PageLayout


def test_errors_are_those_of_their_formulas():
    """Rows 1 and 4 of five new queries, padding of three tokens, a soft cap; weights and output written out."""
    query, key, value, other = (normal(*shape, seed=i) for i, shape in enumerate([(2, 2, 64), *[(40, 64)] * 3]))
    out = normal(2, 2, 64, seed=7)
    rows, scale, cap, start = [1, 4], 0.2, 5.0, 3
    error, kl = shadow.attention_errors(
        query, out, (key, value), (key + 0.1 * other, value), rows, 5, scale, cap, start
    )  # fmt: skip
    squares, sizes, divergences = [], [], []
    for head in range(2):
        for i, row in enumerate(rows):
            seen = slice(start, 40 - 5 + row + 1)
            p, q = (
                (cap * torch.tanh(k[seen] @ query[head, i] * scale / cap)).softmax(0) for k in (key, key + 0.1 * other)
            )
            right = p @ value[seen]
            squares.append((out[head, i] - right).square().sum())
            sizes.append(right.square().sum())
            divergences.append((p * (p / q).log()).sum())
    assert error == pytest.approx(float((sum(squares) / sum(sizes)).sqrt()), rel=1e-4)
    assert kl == pytest.approx(float(sum(divergences) / 4), rel=1e-3)
    same = shadow.attention_errors(query, None, (key, value), (key, value), rows, 5, scale)
    assert same == pytest.approx((0.0, 0.0), abs=1e-6)
    broken = shadow.attention_errors(query, out * torch.nan, (key, value), (key * torch.inf, value), rows, 5, scale)
    assert broken == (shadow.CAP, shadow.CAP)
    assert shadow.chosen_rows(100, 3)[-1] == 99
    assert len(shadow.chosen_rows(100, 7)) == 7
    assert shadow.chosen_rows(3, 7) == [0, 1, 2]


@pytest.mark.parametrize("preset", ["turbo4", "turbo2", "int8", "paper4", "kivi4"])
def test_code_rates_count_what_codes_did(preset: str):
    """An outlier that a range does not cover is clipped; values no further than half a step from their code are not."""
    cache = policy_of(preset).cache
    layout = PageLayout(cache.page_size, 64, cache.key, cache.value)
    key, value = normal(3, cache.page_size, 64, seed=0), normal(3, cache.page_size, 64, seed=1)
    pages = encode_pages(layout, key, value)
    valid = torch.ones(3, cache.page_size, dtype=torch.bool)
    stored = expand_pages(layout, pages)
    within = code_rates(layout, pages, *stored, valid)
    assert all(rates.clipped == 0 and rates.values == key.numel() for rates in within.values())
    assert all(0 < rates.saturated < rates.values / 2 for rates in within.values())
    honest = code_rates(layout, pages, key, value, valid)
    changed = key.clone()
    changed[1, 5, 7] += 1000.0
    found = code_rates(layout, pages, changed, value, valid)
    assert found["key"].clipped == honest["key"].clipped + 1
    assert found["value"] == honest["value"]
    valid[1, 5] = False
    assert code_rates(layout, pages, changed, value, valid)["key"].values == key.numel() - 64
    assert code_rates(layout, pages, changed, value, valid)["key"].clipped <= honest["key"].clipped


def test_a_head_of_a_cache_is_that_head_and_new_pages_are_seen_once():
    view = filled(policy_of("turbo4"), 200, kv_heads=3, batch=2, starts=(0, 9))
    from turboattention.ops.prefill.reference import expand_cache

    key, value = expand_cache(view, torch.float32)
    one = shadow.one_head(view, 1, 2)
    for whole, part in zip((key, value), shadow.stored_values(one), strict=True):
        assert torch.equal(whole[1, 2], part)
    assert torch.equal(shadow.stored_keys(one), key[1, 2])
    exact = shadow.stored_values(one)
    assert shadow.codes_of_new_pages(one, exact, 0, 8, 1, 9)["key"].values == (192 - 10) * 64
    assert shadow.codes_of_new_pages(one, exact, 0, 2, 1, 9)["key"].values == 128 * 64
    assert shadow.codes_of_new_pages(one, exact, 3, 8, 1, 9) == {}


def test_what_is_kept_is_what_came_within_the_bound():
    """Appends of odd sizes and a crop, in float32 and bfloat16; over the bound all is given back."""
    piece = 2 * CHUNK_TOKENS * 64 * 2
    for dtype in (torch.float32, torch.bfloat16):
        budget = Budget(3 * piece)
        kept = Kept(0, 0, budget)
        x = normal(CHUNK_TOKENS * 2 + 100, 64, seed=1).to(dtype)
        first = 0
        for count in (1, 700, 3, 320, 60):
            assert kept.append(x[first : first + count], -x[first : first + count])
            first += count
        kept.crop(1000)
        assert kept.append(x[1000:1084], -x[1000:1084])
        key, value = kept.read()
        stored = x[:1084].to(dtype if dtype.itemsize == 2 else torch.float16).float()
        assert torch.equal(key, stored)
        assert torch.equal(value, -stored)
        assert budget.used == kept.nbytes == 3 * piece
        other = Kept(0, 1, budget)
        assert not other.append(x[:1], x[:1])
        assert (other.nbytes, budget.used) == (0, 3 * piece)
        del kept, key, value
        gc.collect()
        assert budget.used == 0


def test_drift_against_the_state_of_a_calibration(tmp_path: Path):
    layers = [LayerStatistics.empty(2, 1, 64) for _ in range(2)]
    for seed, seen in enumerate(layers):
        x = normal(1, 1, 500, 64, seed=seed) + 3.0
        seen.update(x.expand(-1, 2, -1, -1), x, 2 * x)
    path = tmp_path / "state.json"
    State(path, "run").put("sensitivity x", {"windows": 1, "sums": {}, "statistics": [x.to_dict() for x in layers]})
    reference = Reference.load(path)
    reference.check(2, 1, 64)
    fresh = normal(400, 64, seed=9) + 3.0
    assert reference.layers[1]["key"].drift(0, fresh) == pytest.approx(0.0, abs=0.05)
    assert reference.layers[1]["value"].drift(0, 2 * fresh) == pytest.approx(0.0, abs=0.05)
    assert reference.layers[1]["key"].drift(0, 4 * (fresh - 3.0) + 3.0) == pytest.approx(2.0, abs=0.05)
    with pytest.raises(InvalidInputError, match="calibrate this model"):
        reference.check(3, 1, 64)


def test_files_and_settings_with_mistakes(tmp_path: Path):
    path = tmp_path / "file.json"
    for text in (None, "{", "[]", "{}", '{"turboattention_calibration": 1, "results": {}}',
                 '{"turboattention_calibration": 1, "results": {"sensitivity": {"statistics": [{"key": 1}]}}}',
                 '{"schema": 1, "heads": [{"layer": "x"}]}'):  # fmt: skip
        if text is not None:
            path.write_text(text)
        for load in (Reference.load, expected_errors):
            with pytest.raises(InvalidInputError, match=r"file\.json"):
                load(path)
    path.write_text(
        json.dumps({"schema": 1, "heads": [{"layer": 0, "head": h, "bound": 1, "seen": h} for h in (1, 2)]})
    )
    assert expected_errors(path) == {"0": 2.0}
    for given in ({"share": 0}, {"share": 2}, {"share": True}, {"share": "1"}, {"heads": 0}, {"heads": 1.5},
                  {"memory_mib": 0}, {"reference": 3}, {"shares": 1}, []):  # fmt: skip
        with pytest.raises(InvalidInputError, match="watch"):
            WatchSettings.of(given)
    assert WatchSettings.of({"share": 0.5}) == WatchSettings(share=0.5)
