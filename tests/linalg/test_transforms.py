"""Functions of matrices under autocast, torch.func, compilers, on the meta device and at the ends of each dtype."""

import pytest
import torch
from tensors import gaussian

from danlu.linalg import (
    cr,
    cur,
    interpolative,
    landmark_attention,
    mclip,
    msign,
    mstep,
    nystrom,
    pinv,
    polar,
    singular_power,
    spectral_norm,
    spectral_norm_gradient,
    spectral_relu,
    svd,
)
from danlu.linalg.lowrank import iterative_pinv

FUNCTIONS = {
    "msign": msign,
    "designed": lambda M: msign(M, method="designed", steps=8),
    "polar": lambda M: polar(M)[1],
    "mclip": lambda M: mclip(M, high=2.0),
    "general": lambda M: mclip(M, 0.5, 2.0, method="general"),
    "raise": lambda M: mclip(M, 1.0, 2.0),
    "relu": lambda M: spectral_relu(M, 2.0),
    "step": lambda M: mstep(M, 2.0),
    "power": lambda M: singular_power(M, 2),
    "iterative_pinv": iterative_pinv,
    "pinv": pinv,
    "landmarks": lambda M: landmark_attention(M, M, M, landmarks=2),
}
every = pytest.mark.parametrize("name", FUNCTIONS)


def _by_svd(function):
    def call(M):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return (U * function(S).unsqueeze(-2)) @ Vh

    return call


EXACT = {
    "msign": _by_svd(torch.ones_like),
    "mclip": _by_svd(lambda S: S.clamp(max=2.0)),
    "general": _by_svd(lambda S: S.clamp(0.5, 2.0)),
    "raise": _by_svd(lambda S: S.clamp(1.0, 2.0)),
    "relu": _by_svd(lambda S: S.clamp(min=2.0)),
    "step": _by_svd(lambda S: (S > 2).to(S)),
}


def _generator():
    return torch.Generator().manual_seed(0)


AUTOCAST = {
    **FUNCTIONS,
    "v2": lambda M: mclip(M, method="v2"),
    "block": lambda M: mclip(M, method="block"),
    "svd": lambda M: svd(M[0], 2, method="randomized", generator=_generator()).reconstruct(),
    "cur": lambda M: cur(M[0], 2, generator=_generator()).reconstruct(),
    "interpolative": lambda M: interpolative(M[0], 2, generator=_generator()).reconstruct(),
    "cr": lambda M: cr(M[0], M[0].mT.contiguous(), 2).reconstruct(),
    "nystrom": lambda M: nystrom(torch.eye(4) + M[0, :4, :1] * M[0, :4, 0], 2, method="cholesky").reconstruct(),
    "norm": lambda M: spectral_norm(M).value,
    "norm's gradient": spectral_norm_gradient,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_changes_no_bit(name, dtype):
    M = gaussian(3, 4, 6, dtype=torch.float32)
    expected = AUTOCAST[name](M)
    with torch.autocast("cpu", dtype):
        found = AUTOCAST[name](M)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@every
def test_mapped_over_a_batch_and_on_the_meta_device(name):
    f, M = FUNCTIONS[name], gaussian(3, 4, 6)
    expected = f(M)
    torch.testing.assert_close(torch.func.vmap(f)(M), expected, rtol=1e-9, atol=1e-11)
    assert f(M.to("meta")).shape == expected.shape
    rows = torch.func.vmap(torch.func.grad(lambda x: (f(x) ** 2).sum()))(M)
    torch.testing.assert_close(rows, torch.func.grad(lambda x: (f(x) ** 2).sum())(M), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4, 4)])
def test_first_and_second_derivatives_are_those_of_the_decomposition(name, shape):
    # Singular values on both sides of every threshold.
    U, _, Vh = torch.linalg.svd(gaussian(*shape), full_matrices=False)
    M = (U * torch.tensor([3.0, 2.4, 1.3, 0.2]).double()) @ Vh
    W, along = gaussian(*shape, seed=1), gaussian(*shape, seed=2)
    found, expected = (lambda x, f=f: (f(x) * W).sum() for f in (FUNCTIONS[name], EXACT[name]))
    for order in (1, 2, 3):
        slopes = []
        for f in (found, expected):

            def line(t, f=f):
                return f(M + t * along)

            for _ in range(order):
                line = torch.func.grad(line)
            slopes.append(line(torch.zeros((), dtype=torch.float64)))
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-8, atol=1e-9)
    tangent = torch.func.jvp(FUNCTIONS[name], (M,), (along,))[1]
    torch.testing.assert_close(tangent, torch.func.jvp(EXACT[name], (M,), (along,))[1], rtol=1e-8, atol=1e-9)
    x, y = M.clone().requires_grad_(), M.clone().requires_grad_()
    for f, z in ((found, x), (expected, y)):
        (first,) = torch.autograd.grad(f(z), z, create_graph=True)
        (first * along).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-9)


def test_repeated_and_missing_singular_values_have_finite_second_derivatives():
    W = gaussian(3, 3)
    for M in (torch.eye(3).double(), torch.diag(torch.tensor([3.0, 3.0, 0.0])).double()):
        for f in (msign, mclip):
            assert torch.func.hessian(lambda x, f=f: (f(x) * W).sum())(M).isfinite().all()


@pytest.mark.parametrize("name", ["msign", "designed", "mclip", "iterative_pinv", "landmarks"])
def test_compiled_whole(name):
    torch._dynamo.reset()
    M = gaussian(3, 4, 6)
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(M), FUNCTIONS[name](M), rtol=1e-9, atol=1e-11)


def test_float16_below_its_smallest_normal_number():
    M = (gaussian(6, 8) * 2.0**-18).half()
    exact = M.double()
    sign = msign(M).double()
    assert (torch.linalg.svdvals(sign) - 1).abs().max() < 2e-3
    assert (sign - msign(exact)).norm() < 2e-3
    norm = torch.linalg.matrix_norm(exact, 2)
    assert abs(spectral_norm(M, iterations=100).value.double() / norm - 1) < 1e-2
    cap = norm.item() / 2
    # The spacing of float16 there is 2^-24.
    assert (mclip(M, high=cap).double() - mclip(exact, high=cap)).abs().max() <= 2.0**-24
    W = M.clone().requires_grad_()
    (msign(W) * gaussian(6, 8, seed=1).half()).sum().backward()
    assert W.grad.dtype == torch.float16


@pytest.mark.parametrize("top", [1.7e308, 1e-300])
def test_float64_at_the_ends_of_its_range(top):
    M = gaussian(6, 8)
    M = M / M.abs().max() * top
    assert (torch.linalg.svdvals(msign(M)) - 1).abs().max() < 1e-12
    half = M / 4 if top > 1 else M
    norm = spectral_norm(half, iterations=300).value
    assert norm.item() == pytest.approx((torch.linalg.matrix_norm(half / top, 2) * top).item(), rel=1e-6)
    for method in ("gram", "svd"):
        found = mclip(M, high=top / 2, method=method) / top
        torch.testing.assert_close(found, mclip(M / top, high=0.5), rtol=0, atol=1e-12)
    for steps in (None, 8):
        X = msign(M, method="designed") if steps is None else msign(M, method="designed", steps=steps)
        torch.testing.assert_close(X, msign(M), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 6), (2, 0, 3)])
@every
def test_no_entries_give_none_or_one_clear_error(name, shape):
    M = torch.zeros(shape, dtype=torch.float64)
    if name in ("iterative_pinv", "pinv", "landmarks") and 0 in shape[-2:]:
        with pytest.raises(ValueError, match="must not be empty"):
            FUNCTIONS[name](M)
    else:
        assert FUNCTIONS[name](M).shape[: M.ndim - 2] == shape[:-2]
    if 0 not in shape[-2:]:
        assert spectral_norm(M).value.shape == shape[:-2]
