"""Rational transfer functions: the printed kernel, three forms of one system, stability."""

import numpy as np
import pytest
import torch
from scipy import signal
from torch import Tensor

from danlu.nn.ssm import RTF, RTFConfig, companion, discretize, is_stable, legs, rational_kernel, transfer_function

A = torch.tensor([0.5, -0.25], dtype=torch.float64)
B = torch.tensor([1.0, 2.0], dtype=torch.float64)
PRINTED = [
    0.760751331651,
    1.693748247827,
    -0.656686291001,
    0.751780207457,
    -0.540061676479,
    0.457975890104,
    -0.364003364172,
    0.296495654612,
]


def impulse(layer: RTF, length: int) -> Tensor:
    """Kernel by stepping an impulse through the recurrence: ``(channels, length)``."""
    state = layer.new_state(1, dtype=torch.float64, device=torch.device("cpu"))
    constants, outputs = layer.system(), []
    for k in range(length):
        state, y = layer.step(constants, state, torch.full((1, layer.channels), float(k == 0), dtype=torch.float64))
        outputs.append(y[0])
    return torch.stack(outputs, 1).detach()


def given(a: Tensor, b: Tensor, length: int) -> RTF:
    layer = RTF(1, RTFConfig(state=len(a), length=length)).double()
    with torch.no_grad():
        layer.a.copy_(a)
        layer.b.copy_(b)
    return layer


def test_the_printed_kernel_and_its_output_vector() -> None:
    np.testing.assert_allclose(rational_kernel(A, B, 8), PRINTED, rtol=0, atol=1e-12)
    layer = given(A, B, 8)
    np.testing.assert_allclose(layer.system()[1][0], [0.760751331651, 2.074123913653], rtol=0, atol=1e-12)
    np.testing.assert_allclose(impulse(layer, 8)[0], PRINTED, rtol=0, atol=1e-12)
    # Negative control: b itself as the output vector is the untruncated filter, another kernel.
    wrong = signal.lfilter(B.numpy(), [1, *A.tolist()], [1, 0, 0, 0])
    np.testing.assert_allclose(wrong, [1, 1.5, -0.5, 0.625], rtol=0, atol=1e-12)


def test_the_recurrence_is_scipys_filter_with_the_solved_numerator() -> None:
    layer = given(A, B, 8)
    numerator = layer.system()[1][0].numpy()
    expected = signal.lfilter(numerator, [1, *A.tolist()], np.eye(1, 20)[0])
    np.testing.assert_allclose(impulse(layer, 20)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("d", "step"), [(4, 0.1), (8, 0.3)])
def test_three_forms_of_one_system_agree(d: int, step: float) -> None:
    length = 64
    a, b = discretize(*legs(d), step, method="bilinear")
    c = torch.randn(d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.stack([c @ torch.linalg.matrix_power(a, k) @ b for k in range(length)])
    numbers = transfer_function(a, b, c, length)
    np.testing.assert_allclose(rational_kernel(*numbers, length), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(impulse(given(*numbers, length), length)[0], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(numbers[0], np.poly(a.numpy())[1:], rtol=0, atol=1e-12)


def test_the_start_is_a_shift_register() -> None:
    layer = RTF(3, RTFConfig(state=5, length=17)).double()
    kernel = layer.kernel(17).detach()
    np.testing.assert_allclose(kernel[:, :5], layer.b.detach(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(kernel[:, 5:], 0, atol=1e-12)
    np.testing.assert_allclose(impulse(layer, 17), kernel, rtol=0, atol=1e-12)


def test_stability_is_that_of_the_roots() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(400, 6, generator=generator, dtype=torch.float64) * 0.5
    radius = torch.linalg.eigvals(companion(a)).abs().amax(-1)
    assert torch.equal(is_stable(a), radius < 1)
    assert 20 < is_stable(a).sum() < 380
    small = a / a.abs().sum(-1, keepdim=True) * 0.999  # a sum of sizes below 1 suffices
    assert is_stable(small).all()
    assert is_stable(torch.tensor([-1.7, 0.72]))  # and is not necessary: (z - .9)(z - .8)


def test_an_unstable_recurrence_is_rejected() -> None:
    with pytest.raises(ValueError, match="1 of 1 channels are not stable"):
        given(torch.tensor([-2.0, 0.99]), B, 8).system()


def test_lengths_that_the_numerator_does_not_know_are_rejected() -> None:
    with pytest.raises(ValueError, match="length must be an integer from 1 to 8"):
        given(A, B, 8).kernel(9)
    with pytest.raises(ValueError, match="length must be above the order"):
        rational_kernel(A, B, 2)
