import pytest
import torch

from danlu.linalg.lowrank import ImplicitMatrix, svd

D = torch.float64


def norm(M):
    return torch.linalg.matrix_norm(M)


@pytest.mark.parametrize("shape", [(13, 7), (7, 13), (2, 3, 11, 5)])
def test_exact_svd_reaches_the_eckart_young_errors_in_both_norms(shape, generator):
    M = torch.randn(shape, dtype=D, generator=generator)
    s = torch.linalg.svdvals(M)
    f = svd(M, 3)
    E = M - f.reconstruct()
    assert torch.allclose(norm(E), s[..., 3:].square().sum(-1).sqrt(), rtol=1e-12)
    assert torch.allclose(torch.linalg.matrix_norm(E, 2), s[..., 3], rtol=1e-12)
    assert torch.allclose(f.error, norm(E), rtol=1e-12)


def test_squared_frobenius_norm_is_the_sum_of_squared_singular_values(generator):
    M = torch.randn(17, 11, dtype=D, generator=generator)
    f = svd(M, 11)
    assert float(f.S.square().sum()) == pytest.approx(float(M.square().sum()), rel=1e-13)
    assert torch.allclose(f.reconstruct(), M, atol=1e-12)


def test_left_vectors_follow_from_the_eigenvectors_of_the_gram_matrix(generator):
    M = torch.randn(17, 11, dtype=D, generator=generator)
    f = svd(M, 4)
    assert torch.allclose(M.mT @ M @ f.Vh.mT, f.Vh.mT * f.S**2, atol=1e-10)
    assert torch.allclose(M @ f.Vh.mT / f.S, f.U, atol=1e-12)


def test_no_rank_two_matrix_nearby_is_better(generator):
    M = torch.randn(9, 8, dtype=D, generator=generator)
    f = svd(M, 2)
    best = norm(M - f.reconstruct())
    for _ in range(200):
        left = f.U * f.S + 1e-2 * torch.randn(9, 2, dtype=D, generator=generator)
        right = f.Vh + 1e-2 * torch.randn(2, 8, dtype=D, generator=generator)
        assert norm(M - left @ right) > best


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_randomized_svd_is_within_two_per_cent_of_the_optimum_and_says_its_error(make, generator, decay):
    M = make(307, 211, torch.arange(1.0, 212.0) ** -decay)
    best = float(svd(M, 13, method="exact").error)
    f = svd(M, 13, method="randomized", generator=generator)
    true = float(norm(M - f.reconstruct()))
    assert best <= true <= 1.02 * best
    assert float(f.error) == pytest.approx(true, rel=0.2)
    assert torch.allclose(f.U.mT @ f.U, torch.eye(13, dtype=D), atol=1e-12)
    assert torch.allclose(f.Vh @ f.Vh.mT, torch.eye(13, dtype=D), atol=1e-12)


def test_without_subspace_iterations_a_flat_spectrum_costs_more(make):
    M = make(307, 211, torch.arange(1.0, 212.0) ** -0.5)

    def error(power):
        f = svd(M, 13, method="randomized", power=power, generator=torch.Generator().manual_seed(3))
        return float(norm(M - f.reconstruct()))

    assert error(0) > 1.05 * error(2)


def test_error_estimates_are_unbiased_in_the_square(make, generator):
    M = make(31, 29, 0.8 ** torch.arange(29.0)).expand(300, 31, 29)
    f = svd(M, 4, method="randomized", generator=generator)
    ratios = (f.error / norm(M - f.reconstruct())) ** 2
    assert float(ratios.mean()) == pytest.approx(1, abs=0.06)


def test_a_batch_of_randomized_decompositions_treats_each_matrix(low_rank, generator):
    M = low_rank(23, 19, 3, batch=(2, 5))
    f = svd(M, 3, method="randomized", generator=generator)
    assert f.U.shape == (2, 5, 23, 3)
    assert torch.allclose(f.reconstruct(), M, atol=1e-10)


def test_products_alone_are_enough(make, generator):
    M = make(101, 83, 0.7 ** torch.arange(83.0))
    implicit = ImplicitMatrix.from_products(lambda X: M @ X, lambda X: M.mT @ X, (101, 83), dtype=D)
    f = svd(implicit, 5, generator=generator)
    assert torch.allclose(f.S, torch.linalg.svdvals(M)[:5], rtol=1e-6)


def test_bad_input_is_named():
    M = torch.ones(3, 5)
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 3, got 4"):
        svd(M, 4)
    with pytest.raises(ValueError, match=r"method must be one of 'auto', 'exact', 'randomized'.*did you mean 'exact'"):
        svd(M, 1, method="exakt")
    with pytest.raises(ValueError, match="M must be finite"):
        svd(M * torch.inf, 1)
    with pytest.raises(ValueError, match="M must be finite"):
        svd(M * torch.nan, 1, method="randomized")
    with pytest.raises(TypeError, match=r"M must be float32 or float64, got torch\.bfloat16"):
        svd(M.bfloat16(), 1)
    with pytest.raises(ValueError, match="method must be 'randomized' or 'auto'"):
        svd(M.numpy(), 1, method="exact")
