"""Samplers on normal data, where the denoiser, the flow and the distribution of the samples have closed forms."""

import math
from itertools import pairwise

import pytest
import torch

from danlu.diffusion import (
    EDM,
    Betas,
    Cosine,
    Flow,
    LogitNormalTimes,
    LogNormalNoise,
    Shifted,
    UniformTimes,
    average_velocity,
    classifier_free,
    ddim,
    ddpm,
    euler,
    heun,
    posterior,
    prior,
    time_grid,
)

MEAN, STD = 0.3, 0.7
SCHEDULES = [Cosine(limit=12.0), Betas(), Flow(), EDM(), Shifted(base=Flow(), factor=2.0)]


def named(schedule):
    return str(schedule).replace(" ", "")


def denoiser(schedule, mean=MEAN, std=STD):
    """E[x0 | x] of normal data."""

    def denoise(x, t):
        a, b = (c.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) for c in schedule.coefficients(t))
        return mean + a * std**2 / (a**2 * std**2 + b**2) * (x - a * mean)

    return denoise


def spread(schedule, t):
    """Root of the variance of x_t."""
    a, b = schedule.coefficients(t)
    return torch.sqrt(a**2 * STD**2 + b**2)


def noise(schedule, shape=(13, 1, 2, 3), seed=0):
    return prior(shape, schedule, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flow_end(schedule, x):
    """Where the exact probability flow takes x from t = 1 to clean data."""
    a, _ = schedule.coefficients(1.0)
    return MEAN + STD / spread(schedule, 1.0) * (x - a * MEAN)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize(("method", "order"), [(euler, 1), (heun, 2)])
def test_the_samplers_converge_to_the_flow_at_their_order(schedule, method, order):
    # Measured half-way, at t = 0.5: the step to clean data is one of Euler's rule, from wherever the grid ends.
    x = noise(schedule)
    a, a_half = schedule.coefficients(1.0)[0], schedule.coefficients(0.5)[0]
    exact = a_half * MEAN + spread(schedule, 0.5) / spread(schedule, 1.0) * (x - a * MEAN)
    errors = []
    for half in (32, 64, 128):
        grid = time_grid(schedule, 2 * half + bool(schedule.coefficients(0.0)[1] > 0))
        assert grid[half] == 0.5
        state = method(denoiser(schedule), x, schedule, grid, trajectory=True)[half]
        errors.append((state - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_the_complete_path_ends_where_the_flow_does(schedule):
    x = noise(schedule)
    coarse, fine = (
        (heun(denoiser(schedule), x, schedule, time_grid(schedule, steps)) - flow_end(schedule, x)).abs().max().item()
        for steps in (16, 256)
    )
    # The last step's share is b^2 / (2 STD^2) of x, with b that of the grid's end: up to 2e-3 for the discrete process.
    assert fine < 2e-3
    assert fine < coarse / 10


def test_heun_is_the_algorithm_of_edm_in_sigma():
    schedule, steps = EDM(), 18
    grid = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    sigma = torch.cat([(80 ** (1 / 7) + grid * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, torch.zeros(1)])
    x = expected = noise(schedule)
    calls = 0

    def exact(x, level):
        return MEAN + STD**2 / (STD**2 + level**2) * (x - MEAN)

    for now, then in pairwise(sigma):
        slope = (expected - exact(expected, now)) / now
        guess = expected + (then - now) * slope
        if then:
            slope = (slope + (guess - exact(guess, then)) / then) / 2
        expected = expected + (then - now) * slope

    def counted(x, t):
        nonlocal calls
        calls += 1
        return denoiser(schedule)(x, t)

    found = heun(counted, x, schedule, time_grid(schedule, steps))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert calls == 35


def test_euler_on_the_straight_path_follows_the_velocity():
    schedule = Flow()
    x = expected = noise(schedule)
    times = torch.linspace(1, 0, 9, dtype=torch.float64)
    for now, then in pairwise(times):
        x0 = denoiser(schedule)(expected, now.expand(13))
        expected = expected + (then - now) * (expected - x0) / now
    assert torch.allclose(euler(denoiser(schedule), x, schedule, time_grid(schedule, 8)), expected, atol=1e-13)


def test_euler_on_the_velocity_narrows_normal_data_as_stated():
    # Each step is linear, so the standard deviation of the samples is the result for 1 less the result for 0. The
    # published figures are of samples whose noise had a standard deviation of 0.9986 (their exact one-step samples show
    # 0.699 for 0.7).
    published = {1: 0, 2: 0.3285, 4: 0.4965, 8: 0.5911, 16: 0.6432}
    for steps, expected in published.items():
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        ends = euler(denoiser(Flow()), x, Flow(), time_grid(Flow(), steps))
        assert (ends[1] - ends[0]).item() == pytest.approx(expected, rel=2.5e-3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_ancestral_sampling_is_ddim_with_all_its_noise(schedule):
    x, times = noise(schedule), time_grid(schedule, 7)
    ends = [
        method(denoiser(schedule), x, schedule, times, generator=torch.Generator().manual_seed(5))
        for method in (ddpm, lambda *a, **k: ddim(*a, eta=1.0, **k))
    ]
    assert torch.allclose(ends[0], ends[1], rtol=0, atol=1e-10)


def test_an_ancestral_step_is_that_of_ddpm():
    # Ho et al., equations 6 and 7 with alpha = 1 - beta, at step i of the discrete process.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    for i in (1, 10, 500, 999):
        reverse = posterior(Betas().coefficients((i + 1) / 1000), Betas().coefficients(i / 1000))
        assert reverse.x0.item() == pytest.approx((kept[i - 1].sqrt() * betas[i] / (1 - kept[i])).item(), rel=1e-9)
        x = (1 - betas[i]).sqrt() * (1 - kept[i - 1]) / (1 - kept[i])
        assert reverse.x.item() == pytest.approx(x.item(), rel=1e-9)
        assert reverse.std.item() ** 2 == pytest.approx(((1 - kept[i - 1]) / (1 - kept[i]) * betas[i]).item(), rel=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_the_posterior_keeps_the_distribution_of_the_process(schedule):
    # Drawing x_t from x_0 and then x_s from both must be drawing x_s from x_0: means and variances agree.
    for now, then in [(1.0, 0.6), (0.7, 0.2), (0.4, 0.39)]:
        (a, b), (a_then, b_then) = schedule.coefficients(now), schedule.coefficients(then)
        reverse = posterior((a, b), (a_then, b_then))
        assert (reverse.x * a + reverse.x0).item() == pytest.approx(a_then.item(), rel=1e-12)
        assert (reverse.x**2 * b**2 + reverse.std**2).item() == pytest.approx((b_then**2).item(), rel=1e-12)


@pytest.mark.parametrize(("variance", "std"), [("posterior", 0.0), ("beta", 1.0)])
def test_each_variance_is_exact_for_the_data_it_is_made_for(variance, std):
    # Point data and standard normal data, from the right start: the samples have exactly their variance. The variance
    # is measured on 40000 samples: 1 within 4 sqrt(2 / 40000) = 0.028.
    x = noise(Betas(), shape=(40_000, 1))
    end = ddpm(
        denoiser(Betas(), mean=0.0, std=std),
        x,
        Betas(),
        time_grid(Betas(), 10),
        variance=variance,
        generator=torch.Generator().manual_seed(1),
    )
    # The step to clean data returns the denoiser's mean, which is narrower than standard normal data by b^2 there.
    last_b = Betas().coefficients(0.1)[1].item() ** 2
    assert end.var().item() == pytest.approx(std * (1 - last_b), abs=0.028)


def test_beta_noise_is_larger_than_posterior_noise():
    x = noise(Betas(), shape=(5000, 1))
    spreads = [
        ddpm(
            lambda x, t: torch.zeros_like(x),
            x,
            Betas(),
            torch.tensor([1.0, 0.5], dtype=torch.float64),
            variance=variance,
            generator=torch.Generator().manual_seed(1),
            trajectory=True,
        )[1].std()
        for variance in ("posterior", "beta")
    ]
    assert spreads[1] > 1.02 * spreads[0]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_average_velocity_is_exact_on_any_grid(steps):
    def u(x, t, r):
        t, r = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
        s_t, s_r = (torch.sqrt((1 - s) ** 2 * STD**2 + s**2) for s in (t, r))
        return -MEAN + (s_t - s_r) / (t - r) * (x - (1 - t) * MEAN) / s_t

    x = noise(Flow())
    times = torch.cat([torch.ones(1), torch.rand(steps - 1).sort(descending=True).values, torch.zeros(1)])
    assert torch.allclose(average_velocity(u, x, times), flow_end(Flow(), x), rtol=0, atol=1e-13)


SAMPLERS = [ddpm, lambda *a, **k: ddim(*a, eta=0.5, **k), euler, heun]


@pytest.mark.parametrize("method", SAMPLERS, ids=["ddpm", "ddim", "euler", "heun"])
def test_a_seed_gives_the_same_samples_and_the_trajectory_ends_in_them(method):
    schedule, x, steps = Cosine(limit=12.0), noise(Cosine()), 5
    seen = []

    def run(seed, **options):
        if method not in (euler, heun):
            options["generator"] = torch.Generator().manual_seed(seed)
        return method(denoiser(schedule), x, schedule, time_grid(schedule, steps), **options)

    end = run(1)
    states = run(1, trajectory=True, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(states[-1], end)
    assert torch.equal(states[0], x)
    assert states.shape == (steps + 1, *x.shape)
    assert seen == [(done, steps) for done in range(1, steps + 1)]
    if method not in (euler, heun):
        assert not torch.equal(run(2), end)


@pytest.mark.parametrize("method", SAMPLERS, ids=["ddpm", "ddim", "euler", "heun"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_one_step_is_the_denoised_noise(schedule, method):
    x = noise(schedule)
    end = method(denoiser(schedule), x, schedule, time_grid(schedule, 1))
    assert torch.allclose(end, denoiser(schedule)(x, torch.ones(13, dtype=torch.float64)), rtol=0, atol=1e-12)


def test_samples_keep_the_dtype_of_the_noise():
    x = noise(Flow()).float()
    for method in (ddpm, euler, heun):
        assert method(denoiser(Flow()), x, Flow(), time_grid(Flow(), 3)).dtype == torch.float32


def test_the_grid_leaves_out_clean_times_and_keeps_the_smallest_noise():
    assert time_grid(Betas(steps=5), 5).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert time_grid(EDM(), 5).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert time_grid(EDM(), 1).tolist() == [1]


def test_the_prior_has_the_noise_of_the_last_time():
    for schedule, std in ((Flow(), 1.0), (EDM(), 80.0), (Betas(), 1.0)):
        assert noise(schedule, shape=(20_000,)).std().item() == pytest.approx(std, rel=0.02)


def test_guidance_interpolates_and_extrapolates_between_with_and_without_a_class():
    classes = torch.tensor([0, 3, 2])
    calls = []

    def predict(x, t, c):
        calls.append(len(x))
        return x * t.view(-1, 1) + c.view(-1, 1)

    x, t = torch.randn(3, 2), torch.tensor([0.1, 0.2, 0.3])
    for scale in (0.0, 1.0, 3.0):
        found = classifier_free(predict, classes, none=7, scale=scale)(x, t)
        assert torch.allclose(found, x * t.view(-1, 1) + (7 + scale * (classes - 7)).view(-1, 1))
    assert calls == [3, 3, 6]


def test_training_times_have_the_distributions_they_are_named_after():
    options = {"device": torch.device("cpu"), "generator": torch.Generator().manual_seed(0)}
    t = LogitNormalTimes(mean=-0.4, std=1.0).draw(100_000, Flow(), **options)
    # P(t > 0.95) = P(n > ln 19 + 0.4) = 4.1e-4 for one time, 8e-4 for the larger of two.
    assert torch.maximum(t[:50_000], t[50_000:]).gt(0.95).float().mean().item() == pytest.approx(8e-4, abs=5e-4)
    assert t.logit().mean().item() == pytest.approx(-0.4, abs=0.02)
    t = UniformTimes(low=0.2, high=0.6).draw(20_000, Flow(), **options)
    assert t.min() >= 0.2
    assert t.max() <= 0.6
    assert t.mean().item() == pytest.approx(0.4, abs=0.005)
    for schedule in (EDM(), Betas(), Flow()):
        t = LogNormalNoise(mean=-1.2, std=0.5).draw(20_000, schedule, **options)
        ratio = -schedule.logsnr(t) / 2
        assert ratio.mean().item() == pytest.approx(-1.2, abs=0.02)
        assert ratio.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: time_grid(Flow(), 0), "steps must be an integer of at least 1"),
        (lambda: euler(denoiser(Flow()), noise(Flow()), Flow(), torch.tensor([0.5, 0.7])), "falling numbers"),
        (lambda: euler(denoiser(Flow()), noise(Flow()), Flow(), torch.tensor([1.0, 0.0])), "must all have some noise"),
        (lambda: ddim(denoiser(Flow()), noise(Flow()), Flow(), time_grid(Flow(), 2), eta=2.0), "eta must be in"),
        (lambda: ddpm(denoiser(Flow()), noise(Flow()), Flow(), time_grid(Flow(), 2), variance="b"), "variance must be"),
        (lambda: average_velocity(lambda x, t, r: x, noise(Flow()), torch.tensor([1.0])), "at least 2 falling"),
        (lambda: UniformTimes(low=0.5, high=0.5), "high must be in"),
        (lambda: LogitNormalTimes(std=0.0), "std must be in"),
    ],
)
def test_invalid_arguments_raise(call, said):
    with pytest.raises(ValueError, match=said):
        call()
