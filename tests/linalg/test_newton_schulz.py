"""The half of a symmetric product that is computed gives the whole."""

import pytest
import torch

from danlu.linalg import _newton_schulz


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize(("size", "inner"), [(521, 37), (257, 300), (103, 103), (5, 9)])
def test_a_mirrored_product_equals_the_whole_product(
    size: int, inner: int, stack: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_newton_schulz._MIRRORED, torch.float64, 2)
    X = torch.randn(*stack, size, inner, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = torch.full((*stack, size, size), torch.nan, dtype=torch.float64)
    _newton_schulz._symmetric_product(X, X.mT, out)
    torch.testing.assert_close(out, X @ X.mT, rtol=0, atol=1e-12)
    # Block rows are quarters; what a block on the diagonal rounds to is the matrix product's own affair.
    block = torch.arange(size) // -(-size // 4)
    mirrored = block[:, None] != block
    assert torch.equal(out[..., mirrored], out.mT[..., mirrored])


@pytest.mark.parametrize("stack", [(), (2,)])
def test_a_mirrored_product_adds_the_scaled_matrix_it_is_given(
    stack: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_newton_schulz._MIRRORED, torch.float64, 2)
    X = torch.randn(*stack, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    C = X @ X.mT
    out = torch.full_like(C, torch.nan)
    _newton_schulz._symmetric_product(C, C, out, C, beta=-3.0, alpha=0.5)
    torch.testing.assert_close(out, 0.5 * C @ C - 3 * C, rtol=0, atol=1e-12)
