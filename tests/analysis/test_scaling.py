"""The quantization model: tails, exponents, thresholds, finite lists."""

import math

import pytest
import scipy.stats
import torch

from danlu.analysis import (
    data_loss,
    entropy_tail,
    exponents,
    log_log_slope,
    quanta_frequencies,
    quanta_loss,
    quanta_loss_power_law,
    rank_correlation,
)


@pytest.mark.parametrize("g", [0.4, 1.0, 2.5])
def test_the_loss_is_what_the_learned_quanta_leave(g):
    p = quanta_frequencies(50, g)
    n = torch.tensor([0, 1, 7, 50])
    left = 1 - torch.stack([p[:k].sum() for k in n])
    torch.testing.assert_close(quanta_loss(n, g), left, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(quanta_loss(n, g, low=0.3, high=2.0), 0.3 + 1.7 * left, rtol=1e-12, atol=1e-13)


def test_zipfs_sum_for_one_is_pi_squared_over_six():
    assert quanta_frequencies(1, 1.0).item() == pytest.approx(6 / math.pi**2, rel=1e-14)


@pytest.mark.parametrize(
    ("g", "plain", "half"),
    [
        (0.4, (0.19, 0.020, 0.0020, 0.0002), (0.0096, 2.1e-4, 2.3e-6, 2.3e-8)),
        (1.0, (0.55, 0.051, 0.0050, 0.0005), (0.0337, 7.5e-4, 8.3e-6, 8.3e-8)),
    ],
)
def test_the_errors_of_the_power_law_are_the_tabled_ones(g, plain, half):
    n = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    exact = quanta_loss(n, g)
    assert (quanta_loss_power_law(n - 0.5, g) / exact - 1).tolist() == pytest.approx(plain, rel=0.03)
    assert (quanta_loss_power_law(n, g) / exact - 1).tolist() == pytest.approx(half, rel=0.03)


@pytest.mark.parametrize("g", [0.2, 0.4, 1.0])
def test_the_exponent_in_parameters_is_g(g):
    n = torch.logspace(3, 5, 20).double()
    assert -log_log_slope(n, quanta_loss(n, g)) == pytest.approx(exponents(g).parameters, abs=0.001)


@pytest.mark.parametrize("g", [0.2, 0.4, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("threshold", [1, 10, 100])
def test_the_exponent_in_data_is_g_over_one_more_whatever_the_threshold(g, threshold):
    few, many = (data_loss(samples, g, threshold=threshold) for samples in (1e8, 1e9))
    assert math.log10(few / many) == pytest.approx(exponents(g).data, abs=1e-4)


def test_the_blocks_of_the_sum_over_quanta_agree_with_the_sum_itself():
    p = quanta_frequencies(200_000, 0.4)
    unlearned = torch.special.gammaincc(torch.tensor(10.0).double(), 1e6 * p)
    direct = (p * unlearned).sum() + quanta_loss(200_000, 0.4)
    assert data_loss(1e6, 0.4) == pytest.approx(direct.item(), rel=1e-5)
    assert data_loss(1e6, 0.4, resolution=5e-4) == pytest.approx(direct.item(), rel=1e-7)
    few = quanta_frequencies(500, 0.4) / quanta_frequencies(500, 0.4).sum()
    direct = (few * torch.special.gammaincc(torch.tensor(10.0).double(), 1e5 * few)).sum()
    assert data_loss(1e5, 0.4, quanta=500) == pytest.approx(direct.item(), rel=1e-10)


def test_the_expected_loss_is_the_mean_over_drawn_samples():
    p = quanta_frequencies(2000, 1.0)
    generator = torch.Generator().manual_seed(0)
    lost = []
    for _ in range(200):
        counts = torch.poisson(3000 * p, generator=generator)
        lost.append(float(p[counts < 10].sum() + quanta_loss(2000, 1.0)))
    drawn = torch.tensor(lost, dtype=torch.float64)
    error = drawn.std().item() / math.sqrt(200)
    assert data_loss(3000, 1.0) == pytest.approx(drawn.mean().item(), abs=4 * error)


def test_loss_falls_from_high_without_samples_to_low_with_many():
    assert data_loss(1e-9, 0.4, low=0.1, high=2.0) == pytest.approx(2.0)
    assert data_loss(1e12, 0.4, low=0.1, high=2.0, quanta=100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("low", "high", "slope"), [(1, 10, 0.398), (5, 50, 0.527), (10, 100, 0.604), (20, 200, 0.745), (50, 400, 1.19)]
)
def test_a_finite_list_of_tasks_looks_steeper_than_its_exponent(low, high, slope):
    n = torch.logspace(math.log10(low), math.log10(high), 30).double()
    found = -log_log_slope(n, quanta_loss(n, 0.4, quanta=500))
    assert found == pytest.approx(slope, rel=0.01)  # the table does not say which points its fit took
    assert quanta_loss(500, 0.4, quanta=500).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("n", "error"), [(10, 9.1e-5), (100, 1.4e-6), (1000, 1.6e-8)])
def test_the_form_with_the_logarithm_has_the_tabled_error(n, error):
    exact, form = entropy_tail(n, 0.4)
    assert form / exact - 1 == pytest.approx(error, rel=0.03)


def test_the_total_entropy_is_that_of_the_zipf_distribution():
    p = quanta_frequencies(10**6, 1.0)
    rest = entropy_tail(10**6, 1.0)[1]  # the form, whose error there is below 1e-12
    assert entropy_tail(0, 1.0)[0] == pytest.approx(float(-(p * p.log()).sum()) + rest, rel=1e-9)
    assert entropy_tail(0, 0.4)[0] == pytest.approx(3.9197, abs=5e-5)
    assert entropy_tail(0, 1.0)[0] == pytest.approx(1.6376, abs=5e-5)


def test_rank_correlation_is_spearmans_with_ties_and_infinite_values_in_their_places():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(12, (2, 40), generator=generator).double()
    assert rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, rel=1e-12)
    y[y == 11] = math.inf
    assert rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, rel=1e-12)
    assert rank_correlation(x, x.exp()) == pytest.approx(1.0, abs=1e-15)
    assert rank_correlation(x, -x) == pytest.approx(-1.0, abs=1e-15)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: quanta_frequencies(0, 0.4), "count"),
        (lambda: quanta_frequencies(3, 0.0), "g must be"),
        (lambda: quanta_loss(-1, 0.4), "learned must be from 0 to inf"),
        (lambda: quanta_loss(501, 0.4, quanta=500), "learned must be from 0 to 500"),
        (lambda: data_loss(0.0, 0.4), "samples"),
        (lambda: data_loss(10.0, 0.4, threshold=0), "threshold"),
        (lambda: exponents(-1.0), "g must be"),
        (lambda: entropy_tail(-1, 0.4), "learned"),
        (lambda: log_log_slope(torch.ones(1), torch.ones(1)), "at least 2"),
        (lambda: log_log_slope(torch.ones(3), torch.ones(3)), "spread"),
        (lambda: rank_correlation(torch.ones(2), torch.arange(3)), "equal length"),
        (lambda: rank_correlation(torch.ones(3), torch.arange(3)), "spread of x"),
        (lambda: log_log_slope(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])), "positive"),
        (lambda: log_log_slope(torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.inf])), "finite"),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
