"""Hadamard rotation: orthogonal, symmetric, and useful where it is meant to be."""

import pytest
import torch

from turboattention.quant.affine import dequantize, quantize
from turboattention.quant.error import sqnr_db
from turboattention.quant.granularity import PerToken
from turboattention.quant.rotation import hadamard, rotate

DIMS = (64, 80, 96, 128, 256)


@pytest.mark.parametrize("dim", DIMS)
def test_orthogonal_and_symmetric(dim: int):
    h = hadamard(dim, torch.float64)
    torch.testing.assert_close(h @ h.T, torch.eye(dim, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(h, h.T)
    block = {80: 16, 96: 32}.get(dim, dim)
    assert torch.count_nonzero(h).item() == dim * block
    torch.testing.assert_close(h[h != 0].abs(), torch.full((dim * block,), block**-0.5, dtype=torch.float64))


def test_four_by_hand():
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert (2 * hadamard(4)).tolist() == expected


@pytest.mark.parametrize("dim", DIMS)
def test_product_with_the_matrix(dim: int):
    x = torch.randn(3, 5, dim, dtype=torch.float64)
    torch.testing.assert_close(rotate(x), x @ hadamard(dim, torch.float64), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(rotate(x.float()), (x @ hadamard(dim, torch.float64)).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", DIMS)
def test_order_of_the_additions(dim: int):
    """Neighbours first, each sum rounded, one product at the end: kernels reproduce it bit for bit."""
    x = torch.randn(dim) * torch.logspace(-6, 6, dim)
    values, block, size = list(x), dim & -dim, 1
    while size < block:
        values = [
            values[c - size] - values[c] if c & size else values[c] + values[c + size] for c in range(dim)
        ]  # fmt: skip
        size *= 2
    assert torch.equal(rotate(x), torch.stack(values) * block**-0.5)


def test_input_is_kept():
    x = torch.randn(4, 64)
    before = x.clone()
    rotate(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dim", DIMS)
def test_products_and_values_survive(dim: int):
    q, k = torch.randn(5, dim), torch.randn(7, dim)
    torch.testing.assert_close(rotate(q) @ rotate(k).T, q @ k.T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(rotate(rotate(k)), k, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", (4, 3, 2))
@pytest.mark.parametrize("dim", DIMS)
def test_helps_per_token_codes_with_outlier_channels(dim: int, bits: int):
    x = torch.randn(256, dim)
    x[:, 3] *= 20.0

    def sqnr_of_ordinary_channels(rotated: bool) -> float:
        y = rotate(x) if rotated else x
        z = dequantize(*quantize(y, bits, PerToken()))
        z = rotate(z) if rotated else z
        keep = torch.arange(dim) != 3
        return sqnr_db(z[:, keep], x[:, keep])

    gain = sqnr_of_ordinary_channels(True) - sqnr_of_ordinary_channels(False)
    assert gain > 1.5, gain
