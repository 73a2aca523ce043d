"""Noise schedules against closed forms, automatic derivatives and published tables of aligned times."""

import math

import pytest
import torch
from torch.nn.functional import avg_pool2d

from danlu import config as configs
from danlu.diffusion import EDM, Betas, Cosine, Flow, Shifted, aligned_time

AUTHOR = Betas(start=2e-5)
STABLE = Betas(start=0.00085, end=0.012, power=2)
BASES = [Cosine(), Cosine(limit=15.0), Betas(), AUTHOR, STABLE, Flow(), EDM()]
ALL = [
    *BASES,
    *(Shifted(base=base, factor=3.0) for base in (Cosine(), Betas(), Flow(), EDM())),
    *(Shifted(base=base, factor=5.0, final=2.0) for base in (Cosine(), Betas(), Flow(), EDM())),
]
# Away from the ends, and from the knots of the discrete schedules.
TIMES = torch.linspace(0.0113, 0.9887, 97, dtype=torch.float64)


def named(schedule):
    return str(schedule).replace(" ", "")


@pytest.mark.parametrize("schedule", ALL, ids=named)
def test_the_scale_is_kept(schedule):
    a, b = schedule.coefficients(torch.linspace(0, 1, 101, dtype=torch.float64))
    one = {"vp": a**2 + b**2, "ve": a, "flow": a + b}[schedule.scale]
    assert torch.allclose(one, torch.ones_like(one), rtol=0, atol=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=named)
def test_derivatives_are_those_of_the_coefficients(schedule):
    (a, b), (da, db) = torch.func.jvp(schedule.coefficients, (TIMES,), (torch.ones_like(TIMES),))
    assert torch.equal(a, schedule.coefficients(TIMES)[0])
    assert torch.equal(b, schedule.coefficients(TIMES)[1])
    for found, expected in zip(schedule.derivatives(TIMES), (da, db), strict=True):
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("schedule", ALL, ids=named)
def test_time_inverts_the_ratio_and_the_ratio_falls(schedule):
    logsnr = schedule.logsnr(TIMES)
    a, b = schedule.coefficients(TIMES)
    assert torch.allclose(logsnr, 2 * (a / b).log(), rtol=1e-12, atol=1e-12)
    assert torch.allclose(schedule.snr(TIMES), logsnr.exp(), rtol=1e-12)
    assert bool((logsnr.diff() < 0).all())
    # The inverse loses what the slope of the ratio in t magnifies: 1e-13 suffices for slopes up to about 500.
    assert torch.allclose(schedule.time(logsnr), TIMES, rtol=0, atol=1e-13)
    slope = torch.func.jvp(schedule.logsnr, (TIMES,), (torch.ones_like(TIMES),))[1]
    assert torch.allclose(schedule.logsnr_slope(TIMES), slope, rtol=1e-9)


@pytest.mark.parametrize("schedule", ALL, ids=named)
def test_float32_agrees_with_float64(schedule):
    for narrow, wide in zip(schedule.coefficients(TIMES.float()), schedule.coefficients(TIMES), strict=True):
        assert narrow.dtype == torch.float32
        assert torch.allclose(narrow.double(), wide, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", BASES, ids=named)
@pytest.mark.parametrize("factor", [2.0, 4.0, 0.5])
def test_shifting_divides_the_ratio_by_the_square_of_the_factor(schedule, factor):
    shifted = Shifted(base=schedule, factor=factor)
    ratio = shifted.snr(TIMES) * factor**2 / schedule.snr(TIMES)
    assert torch.allclose(ratio, torch.ones_like(ratio), rtol=0, atol=1e-9)
    assert torch.equal(shifted.condition(TIMES), schedule.condition(TIMES))


def test_shifted_cosine_at_one_half_has_the_published_coefficients():
    published = {1: (0.707107, 0.707107), 2: (0.447214, 0.894427), 4: (0.242536, 0.970143), 8: (0.124035, 0.992278)}
    for factor, expected in published.items():
        found = Shifted(base=Cosine(), factor=float(factor)).coefficients(0.5)
        assert [round(c.item(), 6) for c in found] == list(expected)


def test_the_closed_form_of_a_shifted_signal():
    a, b = Cosine().coefficients(TIMES)
    shifted = Shifted(base=Cosine(), factor=4.0).coefficients(TIMES)[0]
    assert torch.allclose(shifted**2, a**2 / (a**2 + 16 * b**2), rtol=1e-13)


def test_shifting_the_straight_path_is_the_shift_of_its_time():
    # With a = 1 - t the path of factor s is the old one at s t / (1 + (s - 1) t): the form used with rectified flows.
    found = Shifted(base=Flow(), factor=3.0).coefficients(TIMES)[1]
    assert torch.allclose(found, 3 * TIMES / (1 + 2 * TIMES), rtol=1e-14)


def test_the_interpolated_schedule_mixes_two_shifts_linearly_in_log_ratio():
    # The example for 512 pixels: t logSNR_shift256 + (1 - t) logSNR_shift32.
    low, high = (Shifted(base=Cosine(), factor=512 / size).logsnr(TIMES) for size in (32, 256))
    found = Shifted(base=Cosine(), factor=512 / 32, final=512 / 256).logsnr(TIMES)
    assert torch.allclose(found, TIMES * high + (1 - TIMES) * low, rtol=1e-12)


def test_averaging_pixels_divides_the_variance_of_noise_by_their_number():
    noise = torch.randn(16, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    for factor in (2, 4, 8):
        assert avg_pool2d(noise, factor).var().item() * factor**2 == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(
    ("factor", "taus", "rhos"),
    [
        (2, [0.0503, 0.1588, 0.2952, 0.4940, 0.8047, 0.9800], [0.9908, 0.9195, 0.7906, 0.6361, 0.5180, 0.5002]),
        (4, [0.0252, 0.0807, 0.1560, 0.2904, 0.6405, 0.9600], [0.9885, 0.8982, 0.7289, 0.5057, 0.2923, 0.2505]),
    ],
)
def test_aligned_times_of_the_cosine_schedule(factor, taus, rhos):
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.99], dtype=torch.float64)
    tau = aligned_time(Cosine(), t, factor)
    (a, b), (a_tau, b_tau) = Cosine().coefficients(t), Cosine().coefficients(tau)
    rho = torch.sqrt(a**2 + b**2 / factor**2)
    assert tau.tolist() == pytest.approx(taus, abs=5e-5)
    assert rho.tolist() == pytest.approx(rhos, abs=5e-5)
    assert torch.allclose(tau, 2 / math.pi * torch.atan(torch.tan(math.pi * t / 2) / factor), rtol=0, atol=1e-14)
    assert torch.allclose(a_tau, a / rho, rtol=0, atol=1e-9)
    assert torch.allclose(b_tau, b / (factor * rho), rtol=0, atol=1e-9)


def test_aligned_times_at_one_half_to_ten_digits():
    assert aligned_time(Cosine(), 0.5, 2).item() == pytest.approx(0.2951672353, abs=5e-11)
    assert aligned_time(Cosine(), 0.5, 4).item() == pytest.approx(0.1559582608, abs=5e-11)


@pytest.mark.parametrize(
    ("schedule", "factor", "table"),
    [
        (Betas(), 2, {10: 3, 100: 48, 300: 175, 500: 366, 700: 596, 900: 820, 999: 928}),
        (Betas(), 4, {100: 22, 500: 230, 999: 851}),
        (AUTHOR, 2, {100: 50, 500: 366, 999: 928}),
        (STABLE, 2, {500: 292, 999: 874}),
        (STABLE, 4, {500: 127, 999: 723}),
    ],
    ids=["ddpm-2", "ddpm-4", "author-2", "sd-2", "sd-4"],
)
def test_nearest_aligned_steps_of_the_discrete_schedules(schedule, factor, table):
    levels = schedule.levels()
    nearest = {step: int((levels - levels[step] - 2 * math.log(factor)).abs().argmin()) for step in table}
    assert nearest == table
    # The continuous time lies within half a step of the table: index i is time (i + 1) / n.
    for step, expected in table.items():
        found = aligned_time(schedule, (step + 1) / 1000, factor).item() * 1000 - 1
        assert found == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize(("schedule", "counts"), [(Betas(), (3, 6, 8)), (STABLE, (3, 8, 15))], ids=["ddpm", "sd"])
def test_how_many_steps_are_cleaner_than_any_trained_level_once_averaged(schedule, counts):
    levels = schedule.levels()
    found = tuple(int((levels + 2 * math.log(factor) > levels[0]).sum()) for factor in (2, 3, 4))
    assert found == counts


def test_a_level_cleaner_than_the_schedule_has_is_time_zero():
    assert aligned_time(EDM(), 0.0, 2).item() == 0
    assert aligned_time(Cosine(limit=10.0), 0.001, 8).item() == 0


@pytest.mark.parametrize("schedule", [Betas(), AUTHOR, STABLE], ids=["ddpm", "author", "sd"])
def test_betas_are_the_running_product(schedule):
    i = torch.arange(1000, dtype=torch.float64)
    betas = (
        schedule.start ** (1 / schedule.power)
        + i / 999 * (schedule.end ** (1 / schedule.power) - schedule.start ** (1 / schedule.power))
    ) ** schedule.power
    a, b = schedule.coefficients((i + 1) / 1000)
    assert torch.allclose(a**2, (1 - betas).cumprod(0), rtol=1e-12)
    assert torch.allclose(schedule.levels(), 2 * (a / b).log(), rtol=1e-10, atol=1e-11)
    assert [c.item() for c in schedule.coefficients(0.0)] == [1, 0]


def test_the_authors_schedule_has_signal_steps_of_the_stated_form():
    steps = torch.arange(1, 1001, dtype=torch.float64)
    assert torch.allclose(AUTHOR.coefficients(steps / 1000)[0] ** 2, (1 - 0.02 * steps / 1000).cumprod(0), rtol=1e-12)


def test_edm_has_the_published_noise_levels():
    sigma = EDM().coefficients(torch.tensor([0, 0.8, 1], dtype=torch.float64))[1]
    assert sigma.tolist() == pytest.approx([0.002, 24.408342, 80], rel=1e-7)
    assert EDM().condition(EDM().time(-2 * math.log(2.5))).item() == pytest.approx(0.2290727, abs=5e-8)


def test_a_limit_bounds_the_ratio_at_both_ends():
    assert Cosine(limit=15.0).logsnr(torch.tensor([0, 1.0], dtype=torch.float64)).tolist() == pytest.approx([15, -15])
    assert [c.item() for c in Cosine().coefficients(1.0)] == [0, 1]


def test_noised_takes_one_time_for_each_row_or_for_all():
    x0, eps = torch.full((3, 2, 5, 7), 2.0), torch.ones(3, 2, 5, 7)
    rows = Flow().noised(x0, eps, torch.tensor([0.0, 0.25, 1.0]))
    assert rows[:, 0, 0, 0].tolist() == [2, 1.75, 1]
    assert torch.equal(Flow().noised(x0, eps, 0.25)[0], rows[1])


def test_a_schedule_is_its_own_configuration():
    from dataclasses import dataclass

    from danlu.diffusion import ScheduleConfig

    @dataclass(frozen=True)
    class Holder:
        schedule: ScheduleConfig = Cosine()

    globals()["ScheduleConfig"] = ScheduleConfig
    for schedule in ALL:
        assert configs.loads(Holder, configs.dumps(Holder(schedule))).schedule == schedule


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Cosine(limit=0.0), "limit must be in"),
        (lambda: Betas(start=0.0), "start must be in"),
        (lambda: Betas(end=1.0), "end must be in"),
        (lambda: Betas(power=3), "power must be an integer from 1 to 2"),
        (lambda: EDM(sigma_max=0.001), "sigma_max must be in"),
        (lambda: Shifted(base=Cosine(), factor=0.0), "factor must be in"),
        (lambda: Shifted(base=Cosine(), factor=100.0, final=0.1), "final must keep the ratio falling"),
        (lambda: aligned_time(Cosine(), 0.5, 0), "factor must be in"),
    ],
)
def test_invalid_schedules_raise(make, said):
    with pytest.raises(ValueError, match=said):
        make()
