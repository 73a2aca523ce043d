"""S4: the printed kernel, the diagonal-plus-low-rank form, and three ways to one kernel."""

import math

import numpy as np
import pytest
import torch
from scipy import signal
from torch import Tensor

from danlu.nn.ssm import S4, S4Config, discretize, generating_function, krylov_kernel, legs, legs_dplr
from danlu.nn.ssm.s4 import real_form

PRINTED = [
    0.773648637368,
    0.315990983925,
    0.090501082445,
    -0.006504560180,
    -0.036234343847,
    -0.033840943608,
    -0.018741547149,
    -0.001041933029,
]


def powers(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """``C A^k B`` one power after the other."""
    values = []
    for _ in range(length):
        values.append(C @ B)
        B = A @ B
    return torch.stack(values)


def test_the_printed_kernel_of_order_four() -> None:
    A, B = legs(4)
    a, b = discretize(A, B, 0.1, method="bilinear")
    np.testing.assert_allclose(a.diagonal(), [0.904762, 0.818182, 0.739130, 0.666667], rtol=0, atol=5e-7)
    C = torch.ones(4, dtype=torch.float64)
    np.testing.assert_allclose(krylov_kernel(a[None], b[None], C[None], 8)[0], PRINTED, rtol=0, atol=1e-12)
    system = (a.numpy(), b.numpy()[:, None], C.numpy()[None], np.zeros((1, 1)), 0.1)
    _, (response,) = signal.dimpulse(system, n=9)  # SciPy's first sample is the feed-through before any step
    np.testing.assert_allclose(response[1:, 0], PRINTED, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("d", "largest"), [(4, 4.60), (16, 80.97), (64, 1303.27)])
def test_the_low_rank_form_gives_the_matrix_back(d: int, largest: float) -> None:
    eigenvalues, p, b = legs_dplr(d)
    A, B = legs(d)
    assert eigenvalues.imag.max().item() == pytest.approx(largest, abs=0.005)
    assert set(eigenvalues.real.tolist()) == {-0.5}
    # Traces of powers and moments name a system up to its basis; the basis itself is checked below.
    full, q = torch.cat((eigenvalues, eigenvalues.conj())), torch.cat((p, p.conj()))
    dense = torch.diag(full) - torch.outer(q, q.conj())
    v = (2 * torch.arange(d, dtype=torch.float64) + 1).sqrt()
    skew = A + torch.outer(v, v) / 2 + torch.eye(d, dtype=torch.float64) / 2
    assert (skew + skew.T).abs().max() < 1e-13
    _, U = torch.linalg.eigh(-1j * skew)
    U = U.mH[torch.cat((torch.arange(d // 2, d), torch.arange(d // 2 - 1, -1, -1)))]
    phases = (U @ (v + 0j) / math.sqrt(2)) / q  # each eigenvector is free up to a phase, which p fixes
    np.testing.assert_allclose(phases.abs(), np.ones(d), rtol=0, atol=1e-11)
    U = U / phases[:, None]
    np.testing.assert_allclose(U.mH @ dense @ U, A, rtol=0, atol=1e-11)
    np.testing.assert_allclose(U @ (B + 0j), torch.cat((b, b.conj())), rtol=0, atol=1e-11)


def test_eigenvectors_of_the_matrix_itself_are_hopeless() -> None:
    conditions = [torch.linalg.cond(torch.linalg.eig(legs(d)[0])[1]).item() for d in (4, 16)]
    assert conditions[0] == pytest.approx(86, rel=0.02)
    assert conditions[1] > 1e10


def system(d: int, step: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A channel of LegS: its low-rank form with a random output vector, and the same densely."""
    eigenvalues, p, b = legs_dplr(d)
    c = torch.view_as_complex(torch.randn(d // 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    real_b = torch.cat((b.real, b.imag))
    a, bbar = discretize(real_form(eigenvalues, p), real_b, step, method="bilinear")
    return c, 2 * torch.cat((c.real, -c.imag)), a, bbar, torch.stack((eigenvalues, p, b))


@pytest.mark.parametrize("length", [1, 63, 64, 1000, 1024])
def test_generating_function_doubling_and_powers_agree(length: int) -> None:
    d, step = 64, 0.01
    c, C, a, bbar, (eigenvalues, p, b) = system(d, step)
    expected = powers(a, bbar, C, length)
    scale = expected.abs().max()
    doubled = krylov_kernel(a[None], bbar[None], C[None], length)[0]
    assert (doubled - expected).abs().max() < 1e-12 * scale
    # The generating function knows the truncated C only, in the same half as c: C = 2 [Re c, -Im c].
    truncated = C - C @ torch.linalg.matrix_power(a, length)
    half = torch.complex(truncated[: d // 2], -truncated[d // 2 :]) / 2
    steps = torch.tensor([step], dtype=torch.float64)
    found = generating_function(*(t[None] for t in (eigenvalues, p, b, half)), steps, length)[0]
    assert (found - expected).abs().max() < 1e-12 * scale
    if length > 1:  # negative control: with C itself the kernel is folded onto itself
        folded = generating_function(*(t[None] for t in (eigenvalues, p, b, c)), steps, length)[0]
        assert (folded - expected).abs().max() > 1e-6 * scale


@pytest.mark.parametrize(("span", "condition"), [(0.26, 14), (10, 1.002)])
def test_solving_for_the_untruncated_output_is_well_conditioned(span: float, condition: float) -> None:
    A, B = legs(64)
    a, _ = discretize(A, B, span / 256, method="bilinear")
    left = torch.eye(64, dtype=torch.float64) - torch.linalg.matrix_power(a, 256)
    assert torch.linalg.cond(left).item() == pytest.approx(condition, rel=0.05)


def test_the_layers_step_is_the_dense_bilinear_one_and_a_contraction() -> None:
    torch.manual_seed(0)
    layer = S4(3, S4Config(state=8)).double()
    torch.nn.init.normal_(layer.p)
    eigenvalues, p, b, _, step = layer.continuous()
    matrix = real_form(eigenvalues, p).detach()
    for channel in range(3):
        real_b = torch.cat((b.real, b.imag), -1)[channel].detach()
        a, bbar = discretize(matrix[channel], real_b, step[channel].item(), method="bilinear")
        state = torch.zeros(1, 3, 4, dtype=torch.complex128)
        state[0, channel] = torch.complex(real_b[:4].flip(0), real_b[4:])
        u = torch.zeros(1, 3, dtype=torch.float64)
        u[0, channel] = 0.7
        x = torch.cat((state[0, channel].real, state[0, channel].imag))
        after, _ = layer.step(layer.system(), state, u)
        found = torch.cat((after[0, channel].real, after[0, channel].imag))
        np.testing.assert_allclose(found, a @ x + 0.7 * bbar, rtol=0, atol=1e-12)
        assert torch.linalg.matrix_norm(a, 2) <= 1


def test_float32_kernels_keep_six_digits_at_length_4096() -> None:
    torch.manual_seed(0)
    layer = S4(5)
    low = layer.kernel(4096).double()
    exact = layer.double().kernel(4096)
    assert ((low - exact).norm(dim=1) / exact.norm(dim=1)).max() < 1e-4


def test_a_size_without_conjugate_pairs_is_rejected() -> None:
    with pytest.raises(ValueError, match="d must be even"):
        legs_dplr(5)
