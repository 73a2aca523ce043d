"""Upsample guidance against its published form, its algebra, and the exact denoiser of a mixture."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d, interpolate

from danlu.diffusion import EDM, Betas, Cosine, Flow, aligned_time, ddim, prior, time_grid, upsample_guidance

D = torch.float64
SCHEDULES = [Cosine(limit=15.0), Betas(), Flow(), EDM()]


def lively(x, t):
    """A denoiser that depends on the image, on its neighbours and on the time."""
    return torch.tanh(x.roll(1, -1) - 0.3 * x) * (1 + t.view(-1, 1, 1, 1)) + 0.1 * x


def images(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("factor", [2, 3])
def test_it_is_the_published_correction_of_the_noise(schedule, factor):
    x, t = images(5, 2, 6, 12), torch.tensor([0.2, 0.35, 0.5, 0.7, 0.9], dtype=D)
    theta = 1.2
    (a, b), tau = schedule.coefficients(t), aligned_time(schedule, t, factor)
    (a_tau, b_tau), shape = schedule.coefficients(tau), (5, 1, 1, 1)
    rho = (a / a_tau).view(shape)
    if schedule.scale == "vp":
        torch.testing.assert_close(rho.flatten(), (a**2 + b**2 / factor**2).sqrt(), rtol=1e-9, atol=0)
    e_high = (x - a.view(shape) * lively(x, t)) / b.view(shape)
    small = avg_pool2d(x, factor) / rho
    e_low = (small - a_tau.view(shape) * lively(small, tau)) / b_tau.view(shape)
    e = e_high + theta * interpolate(e_low / factor - avg_pool2d(e_high, factor), scale_factor=factor)
    x0 = upsample_guidance(lively, schedule, factor, weight=theta)(x, t)
    torch.testing.assert_close(x0, (x - b.view(shape) * e) / a.view(shape), rtol=1e-9, atol=1e-9)


@given(factor=st.integers(1, 4), rows=st.integers(1, 5), columns=st.integers(1, 5), t=st.floats(0, 1))
def test_with_weight_one_the_average_is_what_the_model_says_of_the_small_image(factor, rows, columns, t):
    schedule, time = Cosine(), torch.full((2,), t, dtype=D)
    x = images(2, 1, rows * factor, columns * factor)
    tau = aligned_time(schedule, time, factor)
    (a, b), (a_tau, b_tau) = schedule.coefficients(time), schedule.coefficients(tau)
    scale = torch.where(b > a, factor * b_tau / b, a_tau / a).view(2, 1, 1, 1)
    guided = upsample_guidance(lively, schedule, factor, weight=1.0)(x, time)
    expected = lively(avg_pool2d(x, factor) * scale, tau if factor > 1 else time)
    torch.testing.assert_close(avg_pool2d(guided, factor), expected, rtol=1e-12, atol=1e-12)


def test_without_weight_before_its_start_or_at_factor_one_it_is_the_model_itself():
    x, t = images(3, 1, 4, 4), torch.tensor([0.1, 0.5, 0.9], dtype=D)
    plain = lively(x, t)
    assert torch.equal(upsample_guidance(lively, Flow(), 2, weight=0.0)(x, t), plain)
    assert torch.equal(upsample_guidance(lively, Flow(), 1)(x, t), plain)
    late = upsample_guidance(lively, Flow(), 2, start=0.5)(x, t)
    assert torch.equal(late[0], plain[0])
    assert not torch.isclose(late[1:], plain[1:]).all(dim=(1, 2, 3)).any()


@pytest.mark.parametrize("schedule", [Cosine(), *SCHEDULES], ids=str)
def test_sampling_stays_finite_from_pure_noise_to_clean_data(schedule):
    x = prior((2, 1, 8, 8), schedule, generator=torch.Generator().manual_seed(3), dtype=D)
    guided = upsample_guidance(lambda x, t: x.clamp(-1, 1), schedule, 4)
    # At a = 0 nothing but the noise is known, which is what a sampler never divides by.
    assert guided(x, torch.ones(2, dtype=D)).isfinite().all()
    assert ddim(guided, x, schedule, time_grid(schedule, 7)).isfinite().all()


WEIGHTS, MEANS = torch.tensor([0.5, 0.3, 0.2], dtype=D), torch.tensor([-1.1, 0.2, 1.4], dtype=D)
SPREAD = 0.3


def pooled_denoiser(schedule, spread):
    """``E[x0 | x, t]`` of one pixel: a mixture of three normal distributions of standard deviation ``spread``."""

    def denoise(x, t):
        (a, b), x = schedule.coefficients(t), x.reshape(-1, 1)
        a, b = a.reshape(-1, 1), b.reshape(-1, 1)
        variance = a**2 * spread**2 + b**2
        weight = (WEIGHTS.log() - (x - a * MEANS) ** 2 / (2 * variance)).softmax(-1)
        each = MEANS + a * spread**2 / variance * (x - a * MEANS)
        return (weight * each).sum(-1).reshape(-1, 1, 1, 1)

    return denoise


@pytest.mark.parametrize(("factor", "time"), [(2, 0.3), (2, 0.6), (4, 0.6)])
def test_the_small_model_is_the_exact_mean_of_the_average_and_without_tau_or_rho_it_is_not(factor, time):
    schedule, count = Cosine(), 40_000
    generator = torch.Generator().manual_seed(factor)
    which = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    # Pixels of an image share their component; their own standard deviation averages down to SPREAD.
    x0 = MEANS[which].view(-1, 1, 1, 1) + factor * SPREAD * torch.randn(
        count, 1, factor, factor, dtype=D, generator=generator
    )
    t = torch.full((count,), time, dtype=D)
    x = schedule.noised(x0, torch.randn(x0.shape, dtype=D, generator=generator), t)
    one_pixel = pooled_denoiser(schedule, SPREAD)

    def denoise(x, t):
        return one_pixel(x, t) if x.shape[-1] == 1 else torch.zeros_like(x)

    def largest_z(guess):
        residual, y = (avg_pool2d(x0, factor) - guess).flatten(), avg_pool2d(x, factor).flatten()
        tests = torch.stack([torch.ones_like(y), y, y.square(), y.sin(), (2 * y).cos()])
        products = residual * tests
        return float((products.mean(-1) / products.std(-1) * count**0.5).abs().max())

    guided = upsample_guidance(denoise, schedule, factor, weight=1.0)
    assert largest_z(avg_pool2d(guided(x, t), factor)) < 4
    small, tau = avg_pool2d(x, factor), aligned_time(schedule, t, factor)
    rho = schedule.coefficients(t)[0] / schedule.coefficients(tau)[0]
    assert largest_z(denoise(small / rho.view(-1, 1, 1, 1), t)) > 10
    assert largest_z(denoise(small, tau)) > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0}, "factor"),
        ({"factor": 2.5}, "factor"),
        ({"factor": 2, "weight": float("nan")}, "weight"),
        ({"factor": 2, "start": 1.5}, "start"),
    ],
)
def test_bad_options_raise_an_error_that_names_them(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        upsample_guidance(lively, Cosine(), **change)


def test_a_size_that_the_factor_does_not_divide_is_rejected():
    with pytest.raises(ValueError, match=r"multiples of 2, got shape \(1, 1, 7, 8\)"):
        upsample_guidance(lively, Cosine(), 2)(images(1, 1, 7, 8), torch.tensor([0.5]))
