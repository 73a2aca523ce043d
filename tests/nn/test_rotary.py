"""Rotary positions: relative, orthogonal, reversible."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.nn import rotary_angles, rotate


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@given(st.integers(0, 5000), st.sampled_from([2, 6, 14]))
def test_inner_products_depend_on_the_difference_of_positions_only(shift: int, dim: int) -> None:
    q, k = random(7, dim), random(7, dim)
    here = rotary_angles(torch.arange(7, dtype=torch.float64), dim)
    there = rotary_angles(torch.arange(shift, shift + 7, dtype=torch.float64), dim)
    expected = rotate(q, *here) @ rotate(k, *here).T
    torch.testing.assert_close(rotate(q, *there) @ rotate(k, *there).T, expected, rtol=0, atol=1e-11)


def test_each_pair_is_turned_by_position_times_its_frequency() -> None:
    x = random(3, 10)
    cos, sin = rotary_angles(torch.tensor([0.0, 2.5, -7.0], dtype=torch.float64), 10, base=100.0)
    y = rotate(x, cos, sin)
    for row, position in enumerate([0.0, 2.5, -7.0]):
        for pair in range(5):
            angle = torch.tensor(position * 100.0 ** (-2 * pair / 10), dtype=torch.float64)
            turn = torch.polar(torch.ones_like(angle), angle)
            expected = torch.complex(x[row, pair], x[row, pair + 5]) * turn
            torch.testing.assert_close(torch.complex(y[row, pair], y[row, pair + 5]), expected, rtol=0, atol=1e-13)


def test_coordinates_before_the_rotated_ones_are_left_alone() -> None:
    x = random(3, 5, 11)
    cos, sin = rotary_angles(torch.arange(5), 4)
    y = rotate(x, cos.double(), sin.double())
    assert torch.equal(y[..., :7], x[..., :7])
    torch.testing.assert_close(y[..., 7:], rotate(x[..., 7:], cos.double(), sin.double()), rtol=0, atol=0)


def test_rotation_by_no_coordinates_is_the_identity() -> None:
    x = random(3, 4)
    assert rotate(x, *rotary_angles(torch.arange(3), 0)) is x


def test_gradient_of_the_rotation_passes_a_numerical_check_twice() -> None:
    cos, sin = rotary_angles(torch.arange(3, dtype=torch.float64), 4)
    x = random(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rotate(t, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda t: rotate(t, cos, sin), x)


def test_angles_far_out_are_as_exact_as_near_the_origin() -> None:
    cos, _ = rotary_angles(torch.tensor([1_000_003]), 2)
    assert cos[0, 0].item() == pytest.approx(torch.tensor(1_000_003.0, dtype=torch.float64).cos().item(), abs=1e-7)


@pytest.mark.parametrize("dim", [3, -2])
def test_odd_and_negative_sizes_are_refused_by_name(dim: int) -> None:
    with pytest.raises(ValueError, match="dim"):
        rotary_angles(torch.arange(3), dim)


def test_tables_wider_than_the_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="6 coordinates"):
        rotate(random(3, 4), *rotary_angles(torch.arange(3), 6))
