import pytest
import torch

from danlu.linalg.lowrank import cr, cr_variance

D = torch.float64


@pytest.fixture
def factors(generator):
    """15 x 50 and 50 x 10 with uneven columns, the shapes of the reference figures."""
    X = torch.randn(15, 50, dtype=D, generator=generator)
    Y = torch.randn(50, 10, dtype=D, generator=generator)
    sizes = torch.distributions.Gamma(1.0, 1.0)
    torch.manual_seed(1)
    return X * sizes.sample((50,)).double(), Y


def square_error(f, X, Y):
    return (X @ Y - f.reconstruct()).square().sum((-2, -1))


@pytest.mark.parametrize("method", ["sampled", "uniform"])
def test_mean_square_error_of_20_000_draws_follows_the_formula_within_three_per_cent(factors, method, generator):
    X, Y = factors
    p = None if method == "sampled" else torch.ones(50, dtype=D)
    batch = (20_000,)
    f = cr(X.expand(*batch, 15, 50), Y.expand(*batch, 50, 10), 8, method=method, generator=generator)
    formula = float(cr_variance(X, Y, 8, probabilities=p))
    assert float(square_error(f, X, Y).mean()) == pytest.approx(formula, rel=0.03)
    bias = torch.linalg.matrix_norm(f.reconstruct().mean(0) - X @ Y)
    # The mean of N unbiased draws is off by sqrt(variance/N): four of those is a failure.
    assert float(bias) < 4 * (formula / 20_000) ** 0.5


def test_sampling_by_norm_has_the_least_variance_of_all_probabilities(factors, generator):
    X, Y = factors
    best = cr_variance(X, Y, 8)
    assert cr_variance(X, Y, 8, probabilities=torch.ones(50, dtype=D)) > 1.2 * best
    sizes = X.norm(dim=0) * Y.norm(dim=1)
    assert float(cr_variance(X, Y, 8, probabilities=sizes)) == pytest.approx(float(best), rel=1e-12)
    for _ in range(100):
        nearby = sizes * torch.exp(0.1 * torch.randn(50, dtype=D, generator=generator))
        assert cr_variance(X, Y, 8, probabilities=nearby) > best
    assert float(cr_variance(X, Y, 16)) == pytest.approx(float(best) / 2, rel=1e-12)


def test_the_diagonal_weights_are_those_of_least_squares(factors):
    X, Y = factors
    f = cr(X, Y, 8, weights="diagonal")
    rank_ones = torch.stack([(X[:, i, None] * Y[i]).flatten() for i in f.indices], dim=1)
    expected = torch.linalg.lstsq(rank_ones, (X @ Y).flatten()[:, None]).solution[:, 0]
    assert torch.allclose(f.weights, expected, rtol=1e-10)
    assert torch.allclose(f.reconstruct(), (rank_ones @ expected).view(15, 10), atol=1e-10)


def test_each_freedom_of_the_weights_lowers_the_error(factors):
    X, Y = factors
    top, diagonal, full = (square_error(cr(X, Y, 8, weights=w), X, Y) for w in (None, "diagonal", "full"))
    assert top > diagonal > full


def test_full_weights_are_the_two_sided_projection(factors):
    X, Y = factors
    f = cr(X, Y, 6, weights="full")
    C, R = X[:, f.indices], Y[f.indices]
    assert f.weights is None
    assert torch.allclose(f.reconstruct(), C @ torch.linalg.pinv(C) @ X @ Y @ torch.linalg.pinv(R) @ R, atol=1e-9)


def test_top_is_exact_choice_for_orthogonal_terms(generator):
    Q = torch.linalg.qr(torch.randn(12, 7, dtype=D, generator=generator))[0]
    Y = torch.randn(7, 5, dtype=D, generator=generator)
    f = cr(Q, Y, 3)
    left_out = torch.ones(7, dtype=torch.bool).index_fill(0, f.indices, False)
    sizes = Y.norm(dim=1)
    assert sizes[f.indices].min() >= sizes[left_out].max()
    assert float(square_error(f, Q, Y)) == pytest.approx(float(sizes[left_out].square().sum()), rel=1e-12)


def test_greedy_discards_terms_that_cancel_where_top_keeps_them(generator):
    X = torch.randn(6, 8, dtype=D, generator=generator)
    Y = torch.randn(8, 4, dtype=D, generator=generator)
    X, Y = torch.cat([X, 9 * X[:, :1], -9 * X[:, :1]], 1), torch.cat([Y, Y[:1], Y[:1]], 0)
    greedy, top = cr(X, Y, 8, method="greedy"), cr(X, Y, 8, method="top")
    assert greedy.indices.tolist() == list(range(8))
    assert square_error(greedy, X, Y) < 1e-20
    assert square_error(top, X, Y) > 1


def test_greedy_is_better_than_top_on_random_products(generator):
    X = torch.randn(40, 15, 20, dtype=D, generator=generator)
    Y = torch.randn(40, 20, 10, dtype=D, generator=generator)
    for rank in (7, 8):
        greedy = square_error(cr(X, Y, rank, method="greedy"), X, Y)
        top = square_error(cr(X, Y, rank), X, Y)
        assert float((greedy < top).double().mean()) > 0.9
        assert float(greedy.mean()) < 0.95 * float(top.mean())


@pytest.mark.parametrize("method", ["top", "greedy"])
def test_all_terms_give_the_product(factors, method):
    X, Y = factors
    assert torch.allclose(cr(X, Y, 50, method=method).reconstruct(), X @ Y, atol=1e-10)


def test_error_estimate_is_near_the_true_error(factors, generator):
    X, Y = factors
    f = cr(X, Y, 8, generator=generator)
    assert float(f.error) == pytest.approx(float(square_error(f, X, Y).sqrt()), rel=0.5)


def test_a_zero_product_is_sampled_without_nan():
    f = cr(torch.zeros(3, 4), torch.zeros(4, 5), 2, method="sampled")
    assert torch.equal(f.reconstruct(), torch.zeros(3, 5))


def test_bad_input_is_named():
    X, Y = torch.ones(3, 4), torch.ones(4, 5)
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 4, got 5"):
        cr(X, Y, 5)
    with pytest.raises(ValueError, match="Y must have as many rows as X has columns"):
        cr(X, Y.mT, 2)
    with pytest.raises(ValueError, match="Y must have X's leading dimensions"):
        cr(X, Y.expand(2, 4, 5), 2)
    with pytest.raises(TypeError, match="Y must have X's dtype"):
        cr(X, Y.double(), 2)
    with pytest.raises(ValueError, match="Y must be finite"):
        cr(X, Y * torch.nan, 2)
    with pytest.raises(ValueError, match="weights must be None for the 'sampled' method"):
        cr(X, Y, 2, method="sampled", weights="diagonal")
    with pytest.raises(ValueError, match="probabilities must be 4 numbers"):
        cr_variance(X, Y, 2, probabilities=torch.ones(3))
