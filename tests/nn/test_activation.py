"""SquarePlus: the named constants, accuracy in the tails, derivatives of every order."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize_scalar

from danlu.nn.activation import (
    DOMINANT,
    EQUAL_AT_ZERO,
    EQUAL_CURVATURE,
    MINIMAX,
    SquarePlus,
    SquarePlusConfig,
    squareplus,
    squareplus_derivative,
    squareplus_inverse,
)

X = torch.linspace(-50, 50, 20_011, dtype=torch.float64)


def distance(b: float) -> np.ndarray:
    x = np.linspace(-50, 50, 200_011)
    return (x + np.sqrt(x * x + b)) / 2 - np.logaddexp(0, x)


def test_constants_to_eight_places() -> None:
    assert pytest.approx(1.921812055672805698668, abs=1e-14) == EQUAL_AT_ZERO
    best = minimize_scalar(lambda b: np.abs(distance(b)).max(), bounds=(1.4, 1.7), method="bounded")
    assert pytest.approx(best.x, abs=1e-3) == MINIMAX  # the search itself is that coarse; the next test is exact
    assert EQUAL_CURVATURE == 4.0


def test_minimax_constant_makes_the_error_equal_at_its_three_extremes() -> None:
    def slope(x: float) -> float:
        return (1 + x / math.sqrt(x * x + MINIMAX)) / 2 - 1 / (1 + math.exp(-x))

    far = brentq(slope, 2.0, 6.0, xtol=1e-13)
    above = (far + math.sqrt(far * far + MINIMAX)) / 2 - math.log1p(math.exp(far))
    below = math.log(2) - math.sqrt(MINIMAX) / 2
    assert far == pytest.approx(3.5646210379963, abs=1e-8)
    assert above == pytest.approx(0.0759314499359699891, abs=1e-12)
    assert below == pytest.approx(above, abs=1e-12)


def test_dominant_constant_is_the_smallest_with_squareplus_above_softplus() -> None:
    softplus = F.softplus(X, threshold=1000)
    assert (squareplus(X, DOMINANT) - softplus).min() >= -1e-12
    at_zero = squareplus(torch.zeros(1, dtype=torch.float64), 0.999 * DOMINANT) - math.log(2)
    assert at_zero.item() < -1e-4


def test_keras_values_and_even_part() -> None:
    values = squareplus(torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(values, torch.tensor([0.6180, 1.0, 1.6180]), atol=5e-5, rtol=0)
    even = squareplus(X) - X / 2
    torch.testing.assert_close(even, even.flip(0), rtol=1e-14, atol=1e-14)


def test_zero_b_is_relu() -> None:
    assert torch.equal(squareplus(X, 0.0), F.relu(X))
    assert torch.isfinite(squareplus_derivative(torch.zeros(1), 0.0)).all()


def test_float32_keeps_its_digits_far_below_zero() -> None:
    x = -torch.logspace(-3, 4, 4001, dtype=torch.float64).float()
    exact = squareplus(x.double())
    assert ((squareplus(x).double() - exact) / exact).abs().max() < 1e-6
    naive = (x + torch.sqrt(x * x + 4)) / 2
    assert ((naive.double() - exact) / exact).abs().max() >= 1
    slope = squareplus_derivative(x.double())
    assert ((squareplus_derivative(x).double() - slope) / slope).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_correctly_rounded_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-60_000, 60_000, 997).to(dtype).requires_grad_()
    y = squareplus(x)
    assert y.dtype == dtype
    assert torch.equal(y, squareplus(x.detach().float()).to(dtype))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(grad).all()


def test_numbers_whose_square_overflows_are_left_as_they_are() -> None:
    x = torch.tensor([1e30, -1e30], requires_grad=True)
    y = squareplus(x)
    assert y.tolist() == [x[0].item(), 0.0]


def test_derivative_agrees_with_finite_differences_and_autograd() -> None:
    x, h = torch.linspace(-5, 5, 101, dtype=torch.float64), 1e-5
    differences = (squareplus(x + h) - squareplus(x - h)) / (2 * h)
    torch.testing.assert_close(squareplus_derivative(x), differences, rtol=0, atol=1e-6)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(squareplus(leaf).sum(), leaf)
    torch.testing.assert_close(grad, squareplus_derivative(x), rtol=1e-14, atol=0)


def test_gradients_of_both_arguments_to_second_order() -> None:
    x = torch.tensor([-3.0, -0.2, 0.0, 1.7, 40.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squareplus, (x, b))
    assert torch.autograd.gradgradcheck(squareplus, (x, b))


def test_curvature_at_two_is_students_density_with_two_degrees_of_freedom() -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(squareplus(x, 2.0).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, (2 + x.detach() ** 2) ** -1.5, rtol=1e-12, atol=0)


def test_blocks_of_a_large_tensor_equal_the_formula_with_any_layout() -> None:
    x = torch.randn(131, 1009, generator=torch.Generator().manual_seed(0))  # two blocks and a rest
    expected = squareplus(x)
    for view in (x, x.T.contiguous().T):
        leaf = view.clone(memory_format=torch.preserve_format).requires_grad_()
        y = squareplus(leaf)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        torch.testing.assert_close(grad, squareplus_derivative(x), rtol=1e-6, atol=0)
    empty = torch.empty(0, 3, requires_grad=True)
    assert squareplus(empty).shape == (0, 3)


@pytest.mark.parametrize("b", [0.3, MINIMAX, 4.0])
def test_inverse_round_trip(b: float) -> None:
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    torch.testing.assert_close(squareplus_inverse(squareplus(x, b), b), x, rtol=0, atol=1e-12)
    assert squareplus_inverse(torch.tensor([0.0, -1.0])).isnan().all()


def test_learnable_b_trains_and_stays_positive() -> None:
    layer = SquarePlus(SquarePlusConfig(b=2.0, learnable=True))
    assert layer.root is not None
    assert layer.root.square().item() == pytest.approx(2.0)
    x = torch.linspace(-1, 1, 7)
    layer(x).sum().backward()
    expected = (2 * layer.root / (4 * torch.sqrt(x * x + 2))).sum()
    torch.testing.assert_close(layer.root.grad, expected.detach())
    assert not list(SquarePlus().parameters())
    assert set(layer.state_dict()) == {"root"}


def test_function_transforms_and_the_compiled_form_agree() -> None:
    x = torch.linspace(-2, 2, 12).view(3, 4)
    torch.testing.assert_close(torch.vmap(squareplus)(x), squareplus(x))
    each = torch.func.vmap(torch.func.grad(squareplus))(x.flatten())
    torch.testing.assert_close(each.view(3, 4), squareplus_derivative(x))
    b = torch.tensor([0.5, 1.0, 2.0])
    by_b = torch.func.vmap(torch.func.grad(lambda t, c: squareplus(t, c).sum(), argnums=1))(x, b)
    torch.testing.assert_close(by_b, (1 / (4 * torch.sqrt(x * x + b[:, None]))).sum(-1))
    leaf = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    traced = torch.compile(squareplus, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(leaf), squareplus(leaf))
    (grad,) = torch.autograd.grad(traced(leaf).sum(), leaf)
    torch.testing.assert_close(grad, squareplus_derivative(leaf.detach()))  # 1/2 at 0 as well


@pytest.mark.parametrize(
    ("options", "message"), [({"b": -1.0}, "b must be"), ({"b": 0.0, "learnable": True}, "b must")]
)
def test_impossible_b_is_rejected_by_name(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SquarePlusConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="b must be"):
        squareplus(X, -1.0)
    with pytest.raises(TypeError, match="floating-point"):
        squareplus(torch.arange(3))


@pytest.mark.parametrize("contiguous", [True, False])
def test_the_slope_from_the_output_is_right_at_every_size(contiguous: bool) -> None:
    sizes = torch.logspace(-25, 25, 101, dtype=torch.float64)
    x = torch.cat((-sizes, sizes)).float()
    x = x if contiguous else torch.stack((x, x), -1)[:, 0]
    x.requires_grad_()
    (slope,) = torch.autograd.grad(squareplus(x, 1.5).sum(), x, materialize_grads=True)
    exact = squareplus_derivative(x.detach().double(), 1.5)
    torch.testing.assert_close(slope.double(), exact, rtol=1e-6, atol=1e-37)  # below: no normal number in float32
