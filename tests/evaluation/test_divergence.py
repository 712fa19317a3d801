"""Numbers per position against torch's own and against an example worked out by hand."""

import math

import pytest
import torch

from turboattention.evaluation.divergence import kl_divergence, negative_log_likelihood, same_top_token

SHAPES = [(1, 1, 7), (2, 63, 11), (3, 65, 200), (1, 130, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_against_torch(shape: tuple[int, int, int]) -> None:
    p, q = 3 * torch.randn(shape), 3 * torch.randn(shape)
    targets = torch.randint(shape[-1], shape[:-1])
    exact_p, exact_q = (
        torch.distributions.Categorical(logits=p.double()),
        torch.distributions.Categorical(logits=q.double()),
    )
    expected = torch.distributions.kl_divergence(exact_p, exact_q)
    torch.testing.assert_close(kl_divergence(p, q).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        negative_log_likelihood(p, targets).double(), -exact_p.log_prob(targets), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(same_top_token(p, q), p.argmax(-1) == q.argmax(-1))


def test_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)."""
    p, q = torch.tensor([[[0.75, 0.25]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(p, q).item() == pytest.approx(expected, rel=1e-6)
    assert negative_log_likelihood(p, torch.tensor([[1]])).item() == pytest.approx(math.log(4.0), rel=1e-6)


def test_equal_distributions_have_no_divergence() -> None:
    logits = 10 * torch.randn(2, 70, 500)
    assert float(kl_divergence(logits, logits).max()) == 0.0
    # A constant added to all logits changes rounding alone; the divergence must not become negative.
    shifted = kl_divergence(logits, logits + 3.0)
    assert float(shifted.min()) >= 0.0
    assert float(shifted.max()) < 1e-5


def test_half_precision_is_computed_in_float32() -> None:
    logits = (5 * torch.randn(1, 5, 300)).bfloat16()
    other = (logits.float() + 0.1 * torch.randn(1, 5, 300)).bfloat16()
    assert torch.equal(kl_divergence(logits, other), kl_divergence(logits.float(), other.float()))
    assert kl_divergence(logits, other).dtype == torch.float32


def test_direction() -> None:
    """The order matters: KL(p || q) is not KL(q || p)."""
    p, q = torch.tensor([[[2.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 1.0, 0.0]]])
    assert kl_divergence(p, q).item() != pytest.approx(kl_divergence(q, p).item(), rel=1e-2)
