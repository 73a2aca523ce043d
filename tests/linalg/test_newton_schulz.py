"""What is computed: half of a symmetric product gives the whole, and no product more than the cost says."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from danlu.approx import optimal_composition
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
    # What a block on the diagonal rounds to is the matrix product's own affair.
    block = torch.arange(size) // -(-size // (4 if size >= 512 or inner > size else 2))
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


@pytest.mark.parametrize("shape", [(12, 12), (12, 36), (48, 12)])
@pytest.mark.parametrize("degrees", [(3, 3), (5, 5, 5, 5, 5), (5, 5, 9), (9, 5, 3, 7)])
def test_the_cost_counts_the_products_that_are_made(degrees: tuple[int, ...], shape: tuple[int, int]) -> None:
    steps = [optimal_composition(0.1, 1, degree=degree) for degree in degrees]
    whole = dataclasses.replace(steps[0], coefficients=tuple(step.coefficients[0] for step in steps))
    with FlopCounterMode(display=False) as counter:
        _newton_schulz.orthogonalize(torch.randn(2, *shape, dtype=torch.float64), whole)
    cost = _newton_schulz.multiplications(whole.coefficients, *shape, torch.float64)
    scale = min(shape) ** 3 if degrees[0] == 3 else 0  # whose first step squares the Gram matrix for the norm
    assert counter.get_total_flops() == 2 * 2 * (cost + scale)
