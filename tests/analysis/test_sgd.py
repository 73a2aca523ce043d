"""The bound on the average loss of SGD: its identities, its schedules, a path by hand, and where it does not hold."""

import math

import pytest
import torch
from tensors import gaussian

from danlu.analysis import (
    average_loss_report,
    best_fixed,
    constant_rates,
    descend,
    increasing_rates_example,
    inverse_root_rates,
    project_to_ball,
    regret_bound,
    step_terms,
)


def interval(theta):
    return theta.clamp(-1, 1)


def distance(x, theta):
    return (theta - x).abs().sum()


def absolute(x, theta):
    return (x[:-1] @ theta - x[-1]).abs()


def logistic(x, theta):
    return torch.nn.functional.softplus(-x[-1].sign() * (x[:-1] @ theta))


def squared(x, theta):
    return (x[:-1] @ theta - x[-1]).square() / 2


# Unit vectors and targets of at most 1.5: the largest gradients over the unit ball.
LOSSES = {absolute: 1.0, logistic: 1 / (1 + math.exp(-1)), squared: 2.5}
SCHEDULES = {
    "tuned constant": lambda steps, G: constant_rates(steps, 2.0, G),
    "inverse root": lambda steps, G: inverse_root_rates(steps, 1.0),
    "tuned inverse root": lambda steps, G: inverse_root_rates(steps, 2.0 / (math.sqrt(2) * G)),
}


def samples(count):
    unit = torch.nn.functional.normalize(gaussian(count, 10), dim=-1)
    return torch.cat([unit, gaussian(count, 1, seed=1).clamp(-1.5, 1.5)], -1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_regret_is_below_the_bound_for_the_best_and_for_random_comparators(loss, schedule):
    x, G = samples(300), LOSSES[loss]
    rates, project, start = SCHEDULES[schedule](300, G), project_to_ball(1.0), torch.zeros(10, dtype=torch.float64)
    best = best_fixed(loss, x, start, project, steps=100)
    rivals = [best, *(project(gaussian(10, seed=seed)) for seed in range(2))]
    for rival in rivals:
        report = average_loss_report(
            loss, x, start, rates, diameter=2.0, gradient_norm=G, project=project, comparator=rival
        )
        assert report.regret <= report.bound_along_path + 1e-9 <= report.bound + 2e-9
    mean = torch.func.vmap(loss, (0, None))
    assert all(mean(x, best).mean() <= mean(x, rival).mean() + 1e-3 for rival in rivals)


@pytest.mark.parametrize(("loss", "schedule"), zip(LOSSES, SCHEDULES))
def test_the_regret_is_below_the_bound_over_ten_thousand_steps(loss, schedule):
    steps, G = 10_000, LOSSES[loss]
    x, project = samples(steps), project_to_ball(1.0)
    rates = SCHEDULES[schedule](steps, G)
    path = descend(loss, x, torch.zeros(10, dtype=torch.float64), rates, project)
    best = best_fixed(loss, x, torch.zeros(10, dtype=torch.float64), project, steps=100)
    mean = torch.func.vmap(loss, (0, None))
    for rival in [best, *(project(gaussian(10, seed=seed)) for seed in range(5))]:
        regret = path.losses.mean() - mean(x, rival).mean()
        assert regret <= regret_bound(rates, 2.0, G) + 1e-9


def test_the_path_on_alternating_samples_is_the_one_by_hand():
    x = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(500)
    rates, start = inverse_root_rates(1000, 1.0), torch.zeros(1, dtype=torch.float64)
    path = descend(distance, x, start, rates, interval)
    expected = torch.tensor([0, 1, 0.292893, 0.870243, 0.370243], dtype=torch.float64)
    torch.testing.assert_close(path.points[:5, 0], expected, atol=5e-7, rtol=0)
    assert path.losses[:4].mean().item() == pytest.approx(1.3943375673, abs=1e-10)
    assert regret_bound(rates[:4], 2.0, 1.0) == pytest.approx(1.3480571313, abs=1e-10)
    assert path.losses.mean().item() - 1 == pytest.approx(0.0311950500, abs=1e-10)
    assert regret_bound(rates, 2.0, 1.0) == pytest.approx(0.0941460576, abs=1e-10)


@pytest.mark.parametrize(
    ("rates", "G", "expected"),
    [
        (constant_rates(100, 2.0, 1.0), 1.0, 0.2),
        (constant_rates(1000, 2.0, 1.0), 1.0, 0.06325),
        (inverse_root_rates(5000, 1.0), 1.0, 0.04228),
        (inverse_root_rates(1000, 1.0), 1 / (1 + math.exp(-1)), 0.07976),
        (constant_rates(1000, 2.0, 2.5), 2.5, 0.15811),
    ],
)
def test_the_bound_has_the_tabled_values(rates, G, expected):
    assert regret_bound(rates, 2.0, G) == pytest.approx(expected, abs=6e-6)


def test_without_projection_the_terms_of_every_step_are_equal():
    x = gaussian(50, 7)
    path = descend(lambda a, theta: a @ theta, x, gaussian(7, seed=1), inverse_root_rates(50, 0.3))
    linear, progress, price = step_terms(path, gaussian(7, seed=2))
    torch.testing.assert_close(linear, progress + price, rtol=1e-12, atol=1e-12)


def test_a_projection_leaves_the_linear_regret_below_the_two_terms():
    x = gaussian(200, 7)
    path = descend(
        lambda a, theta: a @ theta, x, torch.zeros(7).double(), constant_rates(200, 2, 1), project_to_ball(1)
    )
    linear, progress, price = step_terms(path, project_to_ball(1.0)(gaussian(7, seed=2)))
    slack = progress + price - linear
    assert slack.min() >= -1e-12
    assert slack.max() > 1e-3


def test_the_progress_terms_add_up_by_parts():
    path = descend(squared, samples(60), torch.zeros(10).double(), inverse_root_rates(60, 1.0), project_to_ball(1.0))
    comparator = project_to_ball(1.0)(gaussian(10, seed=4))
    d, eta = (path.points - comparator).square().sum(-1), path.learning_rates
    by_parts = d[0] / (2 * eta[0]) - d[-1] / (2 * eta[-1]) + ((1 / eta[1:] - 1 / eta[:-1]) / 2 * d[1:-1]).sum()
    _, progress, _ = step_terms(path, comparator)
    torch.testing.assert_close(progress.sum(), by_parts, rtol=1e-12, atol=1e-12)
    assert by_parts <= d.max() / (2 * eta[-1])


def test_the_projection_on_a_ball_obeys_its_inequality():
    center = gaussian(5, seed=9)
    project = project_to_ball(0.7, center)
    for seed in range(20):
        phi, inside = 2 * gaussian(5, seed=seed), project(gaussian(5, seed=100 + seed))
        image = project(phi)
        assert (phi - inside).square().sum() >= (image - inside).square().sum() + (phi - image).square().sum() - 1e-12
        torch.testing.assert_close(project(image), image)
    assert torch.equal(project_to_ball(1.0)(torch.zeros(3)), torch.zeros(3))


def test_the_best_constant_is_a_minimum_and_twice_or_half_of_it_costs_a_quarter():
    rates = constant_rates(777, 3.0, 5.0)
    least = 15 / math.sqrt(777)
    assert regret_bound(rates, 3.0, 5.0) == pytest.approx(least, rel=1e-12)
    for multiple in (2.0, 0.5):
        assert regret_bound(multiple * rates, 3.0, 5.0) == pytest.approx(1.25 * least, rel=1e-12)


def test_the_best_inverse_root_is_the_root_of_two_worse():
    best = 3.0 / (math.sqrt(2) * 5.0)
    bounds = [regret_bound(inverse_root_rates(10**6, a * best), 3.0, 5.0) * 1000 for a in (0.9, 1.0, 1.1)]
    assert bounds[1] == min(bounds)
    assert bounds[1] == pytest.approx(math.sqrt(2) * 15, rel=1e-3)


@pytest.mark.parametrize(("steps", "expected"), [(10, 5.0209978993), (100, 18.5896038248), (10_000, 198.5446454495)])
def test_the_sum_of_inverse_roots(steps, expected):
    total = inverse_root_rates(steps, 1.0).sum().item()
    assert total == pytest.approx(expected, abs=1e-9)
    assert total <= 2 * math.sqrt(steps) - 1


@pytest.mark.parametrize("make", [lambda T: constant_rates(T, 2.0, 1.0), lambda T: inverse_root_rates(T, 1.0)])
def test_the_bound_falls_as_the_root_of_the_number_of_steps(make):
    few, many = (regret_bound(make(T), 2.0, 1.0) for T in (10**4, 10**6))
    assert math.log(many / few) / math.log(100) == pytest.approx(-0.5, abs=0.01)


def test_increasing_learning_rates_break_the_bound_and_raise():
    regret, formula = increasing_rates_example()
    assert regret == pytest.approx(1.95005, abs=1e-9)
    assert formula == pytest.approx(0.00255, abs=5e-7)
    with pytest.raises(ValueError, match=r"learning_rates must not increase, got 1 after 0\.1 at step 1"):
        regret_bound(torch.tensor([0.1, 1.0]), 2.0, 1.0)


def test_a_linear_loss_reaches_half_of_the_bound():
    path = descend(
        lambda _, theta: theta.sum(), range(100), torch.ones(1).double(), constant_rates(100, 2.0, 1.0), interval
    )
    assert (path.losses.mean().item() + 1) / 0.2 == pytest.approx(0.55, rel=1e-9)


def test_samples_in_a_list_and_in_a_tensor_have_one_best_point():
    x = samples(40)
    start, project = torch.zeros(10, dtype=torch.float64), project_to_ball(1.0)
    ends = [best_fixed(squared, data, start, project, steps=20) for data in (x, list(x))]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: regret_bound(torch.tensor([0.1, -0.1]), 1.0, 1.0), "learning_rates"),
        (lambda: regret_bound(torch.tensor([]), 1.0, 1.0), "learning_rates"),
        (lambda: regret_bound(torch.ones(2), -1.0, 1.0), "diameter"),
        (lambda: constant_rates(0, 1.0, 1.0), "steps"),
        (lambda: inverse_root_rates(3, 0.0), "alpha"),
        (lambda: project_to_ball(0.0), "radius"),
        (lambda: descend(distance, [1.0], torch.zeros(1), torch.ones(2)), "as many as samples"),
        (lambda: descend(distance, [1.0], torch.zeros(1, 1), torch.ones(1)), "start"),
        (lambda: increasing_rates_example(1), "steps"),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_the_bound_along_the_path_takes_the_largest_distance_and_slope_that_occurred():
    x = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    rates, start = torch.full((4,), 0.25, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    # Slopes 2 (theta - x): the path is 0, 1/2, -1/4, 3/8, before a last step.
    report = average_loss_report(
        lambda x, theta: (theta - x).square().sum(),
        x,
        start,
        rates,
        diameter=2.0,
        gradient_norm=4.0,
        project=interval,
        comparator=torch.tensor([0.75], dtype=torch.float64),
    )
    assert report.bound_along_path == pytest.approx(regret_bound(rates, 1.0, 3.0), rel=1e-12)
    assert report.bound == pytest.approx(regret_bound(rates, 2.0, 4.0), rel=1e-12)
