"""Singular-value clipping: the forms agree exactly, fail where they are known to, and the default fails nowhere."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import gaussian

from danlu.approx import Composition, published
from danlu.linalg import mclip, msign, mstep, orthogonalize, singular_power, spectral_relu
from danlu.linalg.mclip import METHODS

exact = functools.partial(msign, method="svd")


def _vectors(m, n, seed=0):
    r = min(m, n)
    return torch.linalg.qr(gaussian(m, r, seed=seed)).Q, torch.linalg.qr(gaussian(n, r, seed=seed + 1)).Q


def _with_spectrum(sigma, m, n, seed=0):
    U, V = _vectors(m, n, seed)
    return (U * torch.as_tensor(sigma, dtype=torch.float64)) @ V.T


def _clipped(M, low=-1.0, high=1.0):
    """Return the definition, by an SVD in float64, with values below 1e-13 of the largest taken as zero."""
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return (U * torch.where(1e-13 * S[..., :1] < S, S.clamp(low, high), 0).unsqueeze(-2)) @ Vh


def _deflated(name, steps, factor):
    """Return the published set with every step at x / factor, as the reference experiment has it."""
    f = published(name, steps)
    rows = tuple(tuple(c / factor ** (2 * i + 1) for i, c in enumerate(row)) for row in f.coefficients)
    return Composition(coefficients=rows, lower=f.lower, upper=f.upper, errors=f.errors, name=f.name)


FOUR_STEPS = _deflated("polar_express_unscaled", 4, 1.01)
EIGHT_STEPS = _deflated("polar_express_unscaled", 8, 1.01)


def _iterated(M, steps=FOUR_STEPS):
    return orthogonalize(M[None], steps, scale="frobenius", gram_steps=0)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(7, 13), (13, 7), (11, 11), (1, 1), (2, 3, 5, 7)])
def test_with_an_exact_sign_every_form_is_the_clip(method, shape):
    M = gaussian(*shape) * 0.5
    for c in (1.0, 0.3):
        X = mclip(M, -c, c, method=method, sign=exact)
        torch.testing.assert_close(X, _clipped(M, -c, c), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "v1"])
def test_every_form_but_v1_is_right_on_a_rank_deficient_matrix(method):
    M = gaussian(13, 3) @ gaussian(3, 7, seed=1)
    torch.testing.assert_close(mclip(M, method=method, sign=exact), _clipped(M), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "svd", "general"])
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.8), (0.5, 0.5), (0.0, 0.4), (-0.2, 0.6), (-0.7, -0.4)])
def test_any_interval_and_null_directions_stay_null(method, low, high):
    for M in (gaussian(7, 13), gaussian(13, 3) @ gaussian(3, 7, seed=1)):
        if method == "general" and low < 0 < -low < high:
            continue
        X = mclip(M, low, high, method=method, sign=exact)
        torch.testing.assert_close(X, _clipped(M, low, high), rtol=0, atol=1e-12)


def test_equal_ends_give_the_scaled_sign_and_a_zero_interval_gives_zero():
    M = gaussian(7, 11)
    torch.testing.assert_close(mclip(M, 0.7, 0.7), 0.7 * msign(M), rtol=0, atol=1e-13)
    assert torch.equal(mclip(M, -1.0, 0.0), torch.zeros_like(M))
    torch.testing.assert_close(mclip(M, high=1e-9) / 1e-9, msign(M), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_orthonormal_matrix_is_a_fixed_point_and_zero_stays_zero(method):
    Q = torch.linalg.qr(gaussian(13, 7)).Q
    torch.testing.assert_close(mclip(Q, method=method, sign=exact), Q, rtol=0, atol=2e-15)
    zero = torch.zeros(2, 5, 7)
    assert torch.equal(mclip(zero, method=method), zero)


@pytest.mark.parametrize("method", METHODS)
def test_transposition_and_batching_pass_through(method):
    M = gaussian(3, 5, 11)
    X = mclip(M, method=method, sign=exact)
    torch.testing.assert_close(mclip(M.mT, method=method, sign=exact), X.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(mclip(M[1], method=method, sign=exact), X[1], rtol=0, atol=1e-12)


def test_input_is_left_unchanged():
    for dtype in (torch.float32, torch.bfloat16):
        M = gaussian(7, 11, dtype=dtype)
        before = M.clone()
        for method in METHODS:
            mclip(M, method=method)
        spectral_relu(M, 1.0)
        mstep(M)
        singular_power(M, 3)
        assert torch.equal(M, before)


def test_matrix_already_inside_comes_back_bit_for_bit():
    M = gaussian(5, 9, dtype=torch.bfloat16)
    M = M / 100
    assert torch.equal(mclip(M), M)


def _reference_spectrum(top):
    """A quarter of the reference experiment: 32 values from 1 to ``top``, 224 from 0 to 1."""
    return torch.cat([torch.linspace(1, top, 32), torch.linspace(0, 1, 224)]).double()


@functools.cache
def _reference_matrix(top=1000.0):
    return _with_spectrum(_reference_spectrum(top), 1024, 256)


@pytest.mark.parametrize(
    ("method", "spectral", "mean_sigma", "mean_entry"),
    [("v1", 544, 21.4, 1.97), ("v2", 258, 11.2, 1.01), ("v3", 1.70, 0.33, 0.016), ("block", 16.8, 1.04, 0.071)],
)
def test_four_bfloat16_steps_give_the_recorded_errors_of_each_form(method, spectral, mean_sigma, mean_entry):
    M = _reference_matrix()
    X = mclip(M.bfloat16(), method=method, sign=_iterated).double()
    S = torch.linalg.svdvals(X)
    expected = torch.sort(_reference_spectrum(1000).clamp(max=1), descending=True).values
    assert S[0].item() == pytest.approx(spectral, rel=0.15)
    assert (S - expected).abs().mean().item() == pytest.approx(mean_sigma, rel=0.15)
    assert (X - _clipped(M)).abs().mean().item() == pytest.approx(mean_entry, rel=0.15)


def test_v3_sets_the_small_singular_values_to_zero_and_the_default_keeps_them():
    sigma = _reference_spectrum(1000)
    U, V = _vectors(512, 128)
    sigma = torch.cat([torch.linspace(1, 1000, 16), torch.linspace(0, 1, 112)]).double()
    M = ((U * sigma) @ V.T).float()

    def small_error(X):
        return ((U.T @ X.double() @ V).diagonal()[16:] - sigma[16:]).abs().mean().item()

    sign = functools.partial(_iterated, steps=EIGHT_STEPS)
    v3 = mclip(M, method="v3", sign=sign)
    assert torch.linalg.matrix_norm(v3.double(), 2).item() == pytest.approx(1, abs=1e-3)  # looks perfect
    assert small_error(v3) > 0.4
    assert small_error(mclip(M, method="block", sign=sign)) < 0.06
    assert small_error(mclip(M)) < 1e-4


def test_v1_is_wrong_by_half_in_the_direction_of_a_zero_singular_value():
    sigma = torch.cat([torch.zeros(1), torch.linspace(0.5, 3, 31)]).double()
    M = _with_spectrum(sigma, 64, 32).float()
    sign = functools.partial(msign, method="polar_express", steps=12)
    error = {m: torch.linalg.matrix_norm(mclip(M, method=m, sign=sign) - _clipped(M), 2) for m in ("v1", "v2", "v3")}
    assert 0.4 < error["v1"] < 0.6
    assert max(error["v2"], error["v3"]) < 0.02


@pytest.mark.parametrize("method", ["v1", "v2", "v3", "block"])
def test_moderate_spectrum_in_float32_is_clipped_to_1e_5_by_every_form(method):
    # Values next to the threshold are where an iterated sign is undecided; keep a gap of the width it resolves.
    sigma = torch.cat([torch.linspace(1.1, 3, 16), torch.linspace(0.1, 0.9, 48)]).double()
    U, V = _vectors(128, 64)
    M = ((U * sigma) @ V.T).float()
    X = mclip(M, method=method, sign=functools.partial(_iterated, steps=_deflated("polar_express_unscaled", 8, 1.0)))
    assert ((U.T @ X.double() @ V).diagonal() - sigma.clamp(max=1)).abs().max() < 1e-5


SPECTRA = {
    "giant and small": _reference_spectrum(1000)[::2],
    "seven decades": torch.logspace(-1, 6, 128).double(),
    "one giant": torch.cat([torch.tensor([1e5]), torch.linspace(0, 1.5, 127)]).double(),
    "exact zeros": torch.cat([torch.linspace(0.5, 3, 64), torch.zeros(64)]).double(),
    "rank one": torch.cat([torch.tensor([7.0]), torch.zeros(127)]).double(),
    "at the threshold": torch.cat([torch.ones(64), torch.full((64,), 1 + 1e-6)]).double(),
    "narrow": torch.linspace(0.2, 2, 128).double(),
}


@pytest.mark.parametrize("shape", [(128, 128), (128, 384), (384, 128)])
@pytest.mark.parametrize("name", SPECTRA)
def test_default_has_a_bounded_error_on_every_spectrum(name, shape):
    sigma = SPECTRA[name]
    M = _with_spectrum(sigma, *shape)
    top = sigma.max().item()
    for dtype, tolerance in (
        (torch.float64, 1e-13 * top),
        (torch.float32, 2e-6 * top),
        (torch.bfloat16, 2e-6 * top + 0.01),
    ):
        given_matrix = M.to(dtype)
        error = torch.linalg.matrix_norm(mclip(given_matrix).double() - _clipped(given_matrix), 2).item()
        assert error < tolerance, (dtype, error)


@given(
    m=st.integers(1, 64),
    n=st.integers(1, 64),
    batch=st.sampled_from([(), (2,), (2, 1)]),
    exponent=st.integers(-25, 25),
    high=st.floats(0.05, 4.0),
    seed=st.integers(0, 99),
)
def test_default_is_the_clip_for_every_shape_and_scale(m, n, batch, exponent, high, seed):
    M = gaussian(*batch, m, n, seed=seed) * 2.0**exponent
    cap = high * 2.0**exponent
    error = (mclip(M, -cap, cap) - _clipped(M, -cap, cap)).abs().max()
    assert error < 1e-12 * 2.0**exponent * math.sqrt(m * n)


def test_step_relu_and_powers_act_on_the_singular_values():
    for shape in ((7, 13), (13, 7), (2, 5, 5)):
        M = gaussian(*shape)
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        for sign_method in ("svd", "sign"):
            step = mstep(M, 1.3, method=sign_method, sign=exact)
            torch.testing.assert_close(step, (U * (S > 1.3).unsqueeze(-2)) @ Vh, rtol=0, atol=1e-12)
            relu = spectral_relu(M, 1.3, method=sign_method, sign=exact)
            torch.testing.assert_close(relu, (U * S.clamp(min=1.3).unsqueeze(-2)) @ Vh, rtol=0, atol=1e-12)
        for k in range(6):
            power = singular_power(M, k, sign=exact)
            torch.testing.assert_close(power, (U * S.pow(k).unsqueeze(-2)) @ Vh, rtol=1e-12, atol=1e-12)


def test_step_is_one_half_at_the_threshold_and_relu_lifts_no_null_direction():
    M = torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.0]).double())
    assert torch.equal(mstep(M), torch.diag(torch.tensor([1.0, 0.5, 0.0, 0.0]).double()))
    assert torch.equal(spectral_relu(M, 1.0), torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0]).double()))


def test_empty_matrices_come_back_empty():
    for method in METHODS:
        M = torch.zeros(2, 0, 3)
        assert mclip(M, method=method).shape == (2, 0, 3)
        assert mclip(M, method=method) is not M


M23 = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mclip([1.0]), TypeError, "M must be a torch.Tensor"),
        (lambda: mclip(torch.ones(2, 2, dtype=torch.int32)), TypeError, "real floating dtype"),
        (lambda: mclip(torch.ones(4)), ValueError, "at least 2 dimensions"),
        (lambda: mclip(torch.full((2, 2), math.nan)), ValueError, "M must be finite"),
        (lambda: mclip(M23, 1.0, 0.5), ValueError, "low must not exceed high, got low=1.0 and high=0.5"),
        (lambda: mclip(M23, high=math.nan), ValueError, "high must be finite"),
        (lambda: mclip(M23, method="v4"), ValueError, "method must be one of"),
        (lambda: mclip(M23, 0.1, 1.0, method="v2"), ValueError, "needs low <= 0 < high"),
        (lambda: mclip(M23, 0.1, 1.0, method="gram"), ValueError, "use 'svd'"),
        (lambda: spectral_relu(M23, 0.0), ValueError, r"threshold must be in \(0, inf\)"),
        (lambda: mstep(M23, -1.0), ValueError, "threshold"),
        (lambda: singular_power(M23, -1), ValueError, "exponent must be an integer of at least 0"),
        (lambda: singular_power(M23, 0.5), TypeError, "exponent must be an integer"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()
