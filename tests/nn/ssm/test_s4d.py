"""The diagonal state space against SciPy's discretisation and filters."""

import math

import numpy as np
import pytest
import torch
from scipy import signal

from danlu.nn.ssm import S4D, S4DConfig, causal_convolution, convolution
from danlu.nn.ssm.s4d import power_sum


def matrices(layer: S4D, channel: int) -> tuple[np.ndarray, ...]:
    """Continuous (A, B, C, D) of one channel, both halves of each conjugate pair written out."""
    a = torch.complex(-layer.log_decay.exp(), layer.frequency)[channel].detach().numpy()
    c = torch.view_as_complex(layer.c)[channel].detach().numpy()
    both = np.concatenate((a, a.conj()))
    return np.diag(both), np.ones((len(both), 1)), np.concatenate((c, c.conj()))[None], np.zeros((1, 1))


@pytest.mark.parametrize("length", [1, 2, 3, 97, 128, 1000])
def test_the_kernel_is_scipys_impulse_response_under_held_inputs(length: int) -> None:
    torch.manual_seed(0)
    layer = S4D(3, S4DConfig(state=10)).double()
    found = layer.kernel(length).detach()
    for channel in range(3):
        dt = layer.log_dt[channel].exp().item()
        a, b, c, _, _ = signal.cont2discrete(matrices(layer, channel), dt, method="zoh")
        expected = [(c @ np.linalg.matrix_power(a, k) @ b).item() for k in range(length)]
        np.testing.assert_allclose(
            found[channel], np.real(expected), rtol=0, atol=1e-12 * max(1, np.abs(expected).max())
        )


def test_the_chunked_sum_of_powers_equals_the_matrix_of_exponentials() -> None:
    generator = torch.Generator().manual_seed(0)
    decay = -torch.rand(5, 7, generator=generator, dtype=torch.float64)
    angle = 9 * torch.rand(5, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 7, 2, generator=generator, dtype=torch.float64)
    w = torch.view_as_complex(weight)
    for length in (1, 31, 64, 257):
        k = torch.arange(length, dtype=torch.float64)
        expected = 2 * torch.einsum("hn,hnk->hk", w, torch.exp(torch.complex(decay, angle)[..., None] * k)).real
        torch.testing.assert_close(power_sum(decay, angle, w, length), expected, rtol=0, atol=1e-12)


def test_starts_are_the_published_frequencies() -> None:
    lin, inv = S4D(1, S4DConfig(state=8)), S4D(1, S4DConfig(state=8, init="inv"))
    np.testing.assert_allclose(lin.frequency[0].detach(), [math.pi * n for n in range(4)], rtol=1e-6)
    np.testing.assert_allclose(
        inv.frequency[0].detach(), [8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)], rtol=1e-6
    )
    assert lin.log_decay.exp().unique().item() == 0.5
    steps = S4D(997, S4DConfig(state=2, dt_min=0.01, dt_max=0.02)).log_dt.exp()
    assert 0.01 <= steps.min() < 0.0101
    assert 0.0198 < steps.max() <= 0.02


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 17), (3, 1, 128), (2, 3, 251)])
def test_the_convolution_is_scipys_filter(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(shape, generator=generator, dtype=torch.float64)
    k = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    found = causal_convolution(u, k)
    expected = np.stack([[signal.lfilter(k[h], [1.0], u[b, h]) for h in range(shape[1])] for b in range(shape[0])])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * math.sqrt(shape[-1]))


def test_both_derivatives_of_the_convolution_are_those_of_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    u = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(causal_convolution, (u, k))
    assert torch.autograd.gradgradcheck(causal_convolution, (u, k))


def test_groups_of_channels_convolve_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    u, k, upstream = (torch.randn(s, 5, 37, generator=generator, dtype=torch.float64).squeeze(0) for s in (3, 1, 3))
    inputs, found = (u.requires_grad_(), k.requires_grad_()), []
    for block in (1, 3 * 75 * 2, 1 << 30):  # one channel at a time, two with a last one alone, all
        monkeypatch.setattr(convolution, "_BLOCK", block)
        y = causal_convolution(*inputs)
        found.append((y, *torch.autograd.grad(y, inputs, upstream)))
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], rtol=1e-13, atol=1e-13)


def test_a_kernel_of_another_length_or_width_is_rejected() -> None:
    with pytest.raises(ValueError, match="k \\(channels, time\\)"):
        causal_convolution(torch.zeros(2, 3, 7), torch.zeros(3, 8))


def test_what_a_step_needs_of_the_weights_is_read_without_following_them() -> None:
    layer = S4D(3, S4DConfig(state=10))
    assert not any(part.requires_grad for part in layer.system())
    assert layer.kernel(5).requires_grad
