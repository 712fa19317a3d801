"""Gradients through the reads of later pages, estimates against measurements, rank correlation."""

import pytest
import torch

from turboattention.calibration.capture import Captured, _score_of_draws, capturing, score_gradients
from turboattention.calibration.levels import Unit, levels, policy_of, uniform
from turboattention.calibration.sensitivity import (
    add,
    chosen_probes,
    gradients_of_stored,
    measured,
    spearman,
    table_from_json,
    table_per_token,
    table_to_json,
    window_estimates,
)
from turboattention.calibration.stored import rounding_errors
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.integrations.models import LoadedModel
from turboattention.integrations.transformers import TurboCache, enable, model_shape


def attention_over_stored(captured: Captured, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Own page and sink exact, earlier pages from ``key`` and ``value`` ``[kv_heads, tokens, head_dim]``."""
    kv_heads, tokens, dim = key.shape
    query = captured.query[0].reshape(kv_heads, -1, tokens, dim)
    rows, columns = torch.arange(tokens)[:, None], torch.arange(tokens)
    read = (columns // 64 < rows // 64) & (columns > 0)
    exact_key, exact_value = captured.key[0][:, None], captured.value[0][:, None]
    scores = torch.where(read, query @ key[:, None].mT, query @ exact_key.mT) * captured.scale
    weights = scores.masked_fill(columns > rows, -torch.inf).softmax(-1)
    out = (weights * read) @ value[:, None] + (weights * ~read) @ exact_value
    return out.flatten(0, 1)[None]


def test_gradients_are_those_of_what_later_pages_read() -> None:
    query, gradient = torch.randn(2, 1, 4, 320, 64)
    key, value = torch.randn(2, 1, 2, 320, 64)
    captured = Captured(query, key, value, 0.2, gradient)
    leaves = [x[0].clone().requires_grad_() for x in (key, value)]
    (attention_over_stored(captured, *leaves) * gradient).sum().backward()
    found = gradients_of_stored(captured)
    torch.testing.assert_close(found["key"], leaves[0].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["value"], leaves[1].grad, rtol=1e-4, atol=1e-4)


def test_rounding_errors_are_those_of_the_real_cache(loaded: LoadedModel) -> None:
    tokens = torch.randint(2, 90, (1, 256))
    with torch.inference_mode(), capturing(loaded.model) as layers:
        loaded.model(input_ids=tokens, use_cache=False)
        captured = dict(layers)
    shape = model_shape(loaded.model.config)
    policy = policy_of("same", uniform("2+2x18", "2", shape), shape)
    with enable(loaded.model, policy), torch.inference_mode():
        cache = TurboCache(loaded.model.config, policy)
        for part in tokens.split(64, dim=1):
            loaded.model(input_ids=part, past_key_values=cache)
        cache.commit()
    # The first layer alone sees the same K and V in both runs.
    from turboattention.quant.codec import expand_pages

    (group,) = cache.turbo_layers[0].cache.groups
    key, value = (x[0].flatten(1, 2) for x in expand_pages(group.layout, group.pages))
    errors = {(tensor, level): error for tensor, level, error in rounding_errors(captured[0])}
    for stored, exact, error in (
        (key, captured[0].key, errors["key", "2+2x18"]),
        (value, captured[0].value, errors["value", "2"]),
    ):
        expected = stored - exact[0].half().float()
        expected[:, 0] = 0.0
        # Rounding of K may fall to the other side where SDPA's order of additions does.
        assert (error - expected).abs().mean() < 1e-3 * error.abs().mean()


def test_estimates_rank_units_as_measurements_do(loaded: LoadedModel) -> None:
    windows = torch.randint(2, 90, (4, 513))
    total: dict[Unit, dict[str, float]] = {}
    for number, window in enumerate(windows):
        layers = score_gradients(loaded.model, window[None, :-1], torch.Generator().manual_seed(number))
        add(total, window_estimates(layers))
    table = table_per_token(total, 4 * 512)
    assert len(table) == 8
    probes = chosen_probes(table, 16, seed=0)
    assert probes == chosen_probes(table, 16, seed=0)
    estimates = [table[unit][level] for unit, level in probes]
    seen = measured(loaded.model, windows, probes, model_shape(loaded.model.config))
    assert spearman(estimates, seen) > 0.9
    ratio = sum(estimates) / sum(seen)
    assert 0.4 < ratio < 2.5


def test_draws_follow_the_distribution() -> None:
    probability = torch.tensor([0.1, 0.0, 0.2, 0.3, 0.4])
    gradient = _score_of_draws(probability.log().expand(1, 20_000, -1), torch.Generator().manual_seed(0))
    drawn = gradient[0] + probability  # one-hot
    torch.testing.assert_close(drawn.sum(-1), torch.ones(20_000))
    # Four standard errors of the frequencies; what has no probability is never drawn.
    torch.testing.assert_close(drawn.mean(0), probability, atol=0.014, rtol=0)
    assert float(drawn[:, 1].abs().max()) == 0.0


def test_errors_of_a_channel_add_up_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    query, gradient = torch.randn(2, 1, 2, 192, 64)
    key, value = torch.randn(2, 1, 1, 192, 64)
    captured = Captured(query, key, value, 0.125, gradient)
    at_key = gradients_of_stored(captured)["key"]
    sign = at_key.sign()
    costs = []
    # Errors that push the same way at every token, and ones that take turns.
    for pattern in (torch.ones(192), torch.tensor([1.0, -1.0]).repeat(96)):
        error = 0.01 * sign * pattern[:, None]
        monkeypatch.setattr(
            "turboattention.calibration.sensitivity.rounding_errors", lambda _, error=error: [("key", "2", error)]
        )
        costs.append(window_estimates({0: captured})[Unit(0, 0, "key")]["2"])
    assert costs[0] == pytest.approx(0.5e-4 * float(at_key.abs().double().sum(1).square().sum()), rel=1e-4)
    assert costs[1] < 0.2 * costs[0]


def test_the_model_is_as_it_was(loaded: LoadedModel) -> None:
    model = loaded.model
    before = model.config._attn_implementation
    weights = [x.requires_grad for x in model.parameters()]
    layers = score_gradients(model, torch.randint(2, 90, (1, 128)), torch.Generator().manual_seed(0))
    assert sorted(layers) == [0, 1]
    assert all(x.gradient is not None and x.gradient.shape == x.query.shape for x in layers.values())
    assert model.config._attn_implementation == before
    assert [x.requires_grad for x in model.parameters()] == weights
    assert all(x.grad is None for x in model.parameters())
    refused = pytest.raises(InvalidInputError, match=r"^model: expected eager or SDPA")
    with enable(model, "turbo4"), refused, capturing(model):
        pass


def test_soft_capped_scores_are_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.model.config, "attn_logit_softcapping", 30.0, raising=False)
    with pytest.raises(UnsupportedError, match="no form for soft-capped scores"), capturing(loaded.model):
        pass


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # Ties share their mean rank: 1.5, 1.5, 3 against 1, 2, 3.
    assert spearman([5, 5, 6], [1, 2, 3]) == pytest.approx(0.8660254)
    with pytest.raises(InvalidInputError, match=r"^ranks: expected two lists of one length"):
        spearman([1], [1])


def test_tables_survive_json() -> None:
    table = {Unit(3, 1, "key"): {"2": 0.25}, Unit(10, 0, "value"): dict.fromkeys(levels("value", 64), 1.0)}
    assert table_from_json(table_to_json(table)) == table
