"""Every prediction gives every other, exactly, and means what it says for normal data."""

import itertools

import pytest
import torch

from danlu.diffusion import (
    EDM,
    PREDICTIONS,
    Betas,
    Cosine,
    Flow,
    Shifted,
    convert,
    from_x0_eps,
    input_scale,
    preconditioning,
    to_x0_eps,
)

SCHEDULES = [Cosine(), Betas(), Flow(), EDM(sigma_max=20.0), Shifted(base=Cosine(), factor=2.0)]
T = torch.linspace(0.05, 0.95, 11, dtype=torch.float64)


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(11, 3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))


def named(schedule):
    return str(schedule).replace(" ", "")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(PREDICTIONS, 2)))
def test_every_prediction_gives_every_other(schedule, source, target):
    x0, eps = pair()
    x = schedule.noised(x0, eps, T)
    given = from_x0_eps(x0, eps, T, schedule, source, data_std=0.7)
    expected = from_x0_eps(x0, eps, T, schedule, target, data_std=0.7)
    found = convert(given, x, T, schedule, source=source, target=target, data_std=0.7)
    # Relative to the largest entry: a score near t = 0 is as large as 1 / b.
    assert (found - expected).abs().max() <= 1e-12 * max(1, expected.abs().max())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_data_and_noise_come_back_and_make_up_the_sample(schedule, kind):
    x0, eps = pair(1)
    x = schedule.noised(x0, eps, T)
    got_x0, got_eps = to_x0_eps(from_x0_eps(x0, eps, T, schedule, kind), x, T, schedule, kind)
    assert torch.allclose(schedule.noised(got_x0, got_eps, T), x, rtol=1e-13, atol=1e-13)
    assert torch.allclose(got_eps, eps, rtol=0, atol=1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_the_mean_predictions_of_normal_data_are_its_score_and_velocity(schedule):
    mean, std = 0.3, 0.7
    x = torch.randn(11, 1, 1, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (a, b), (da, db) = ([c.view(-1, 1, 1, 1) for c in f(T)] for f in (schedule.coefficients, schedule.derivatives))
    variance = a**2 * std**2 + b**2
    x0 = mean + a * std**2 / variance * (x - a * mean)
    score = convert(x0, x, T, schedule, source="x0", target="score")
    assert torch.allclose(score, -(x - a * mean) / variance, rtol=1e-11, atol=1e-11)
    # The flow of normal data scales distances from the mean with the root of the variance.
    slope = (a * da * std**2 + b * db) / variance
    velocity = convert(x0, x, T, schedule, source="x0", target="velocity")
    assert torch.allclose(velocity, da * mean + slope * (x - a * mean), rtol=1e-11, atol=1e-11)


def test_preconditioning_at_noise_two_and_a_half():
    found = preconditioning(EDM().time(-2 * torch.tensor(2.5, dtype=torch.float64).log()), EDM())
    assert [c.item() for c in found] == pytest.approx([0.0384615, 0.4902903, 0.3922323, 0.2290727], abs=5e-8)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_a_preconditioned_output_is_skip_and_out(schedule):
    x0, eps = pair(3)
    x = schedule.noised(x0, eps, T)
    skip, out, scale, _ = (c.view(-1, 1, 1, 1) for c in preconditioning(T, schedule, data_std=0.5))
    F = from_x0_eps(x0, eps, T, schedule, "edm", data_std=0.5)
    assert torch.allclose(skip * x + out * F, x0, rtol=0, atol=1e-12)
    assert torch.allclose(input_scale(x, T, schedule, "edm"), scale * x, rtol=1e-14)
    assert input_scale(x, T, schedule, "v") is x


def test_a_preconditioned_target_has_unit_variance_at_every_noise():
    # The design of EDM: inputs and targets of unit variance, whatever sigma.
    generator = torch.Generator().manual_seed(4)
    x0 = 0.5 * torch.randn(11, 1, 100, 200, generator=generator, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    target = from_x0_eps(x0, eps, T, EDM(), "edm")
    given = input_scale(EDM().noised(x0, eps, T), T, EDM(), "edm")
    for value in (target, given):
        assert torch.allclose(value.flatten(1).var(1), torch.ones(11, dtype=torch.float64), atol=0.05)


def test_preconditioning_of_a_variance_preserving_process_is_v_prediction():
    x0, eps = pair(5)
    edm = from_x0_eps(x0, eps, T, Cosine(), "edm", data_std=1.0)
    assert torch.allclose(edm, -from_x0_eps(x0, eps, T, Cosine(), "v"), rtol=0, atol=1e-14)


def test_the_velocity_of_the_straight_path_is_noise_less_data():
    x0, eps = pair(6)
    assert torch.equal(from_x0_eps(x0, eps, T, Flow(), "velocity"), eps - x0)


def test_an_unknown_prediction_raises_and_the_error_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'velocity'"):
        convert(T, T, T, Flow(), source="eps", target="velocty")
    with pytest.raises(ValueError, match="kind must be one of"):
        to_x0_eps(T, T, T, Flow(), "noise")
