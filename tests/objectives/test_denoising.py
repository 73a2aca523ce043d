"""Denoising: every prediction trains the same denoiser, and the configured samplers draw from it."""

import pytest
import torch
from torch import nn

from danlu.diffusion import EDM, PREDICTIONS, Betas, Cosine, Flow, LogNormalNoise, Shifted, from_x0_eps
from danlu.objectives import Denoising, DenoisingConfig, multiscale_loss

MEAN, STD = 0.2, 0.3


class Exact(nn.Module):
    """The mean prediction for normal data, given only what a network is given; ``shift`` is added to it."""

    num_classes = 0

    def __init__(self, config, shift=0.0):
        super().__init__()
        self.config = config
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x, condition, classes=None, r=None):
        schedule, kind, std = self.config.schedule, self.config.prediction, self.config.data_std
        t = schedule.time(-8 * condition.double()) if isinstance(schedule, EDM) else condition.double()
        a, b = (c.view(-1, 1, 1, 1) for c in schedule.coefficients(t))
        x = x.double() * (torch.hypot(a * std, b) if kind == "edm" else 1)
        x0 = MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (x - a * MEAN)
        value = from_x0_eps(x0, (x - a * x0) / b, t, schedule, kind, data_std=std)
        return value.float() + self.shift


class Given(nn.Module):
    """Answers with its own parameter, and keeps what it was given."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))
        self.given = []

    def forward(self, x, t, classes=None, r=None):
        self.given.append((x, t, classes))
        return self.value.expand_as(x)


def batch(size=2048, seed=0, side=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": MEAN + STD * torch.randn(size, 1, side, side, generator=generator),
        "labels": torch.randint(3, (size,), generator=generator),
    }


CASES = [(Cosine(limit=10.0), kind) for kind in PREDICTIONS] + [
    (EDM(sigma_min=0.02), "edm"),
    (Betas(), "eps"),
    (Flow(), "velocity"),
    (Shifted(base=Cosine(limit=10.0), factor=2.0), "v"),
]


@pytest.mark.parametrize(("schedule", "kind"), CASES, ids=[f"{type(s).__name__}-{k}" for s, k in CASES])
def test_the_exact_denoiser_is_stationary_and_draws_the_data(schedule, kind):
    config = DenoisingConfig(schedule=schedule, prediction=kind, times=LogNormalNoise(std=0.5), clip=False)
    objective = Denoising(Exact(config), config)
    torch.manual_seed(0)
    found = []
    for seed in range(6):
        objective.zero_grad()
        (objective(batch(seed=seed)) / 2048).backward()
        found.append(objective.model.shift.grad.item())
    found = torch.tensor(found)
    assert abs(found.mean().item()) < 4 * found.std().item() / 6**0.5 + 1e-6
    draws = objective.sample((4000, 1, 1, 1), steps=40, generator=torch.Generator().manual_seed(0))
    assert draws.mean().item() == pytest.approx(MEAN, abs=0.025)
    # DDIM's 40 steps narrow by a few hundredths; 4000 draws give the standard deviation to 0.013.
    assert draws.std().item() == pytest.approx(STD, abs=0.06)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 100), ("ddim", 100), ("heun", 18)])
def test_every_sampler_draws_the_data(sampler, steps):
    config = DenoisingConfig(schedule=EDM(), prediction="edm", sampler=sampler, clip=False)
    objective = Denoising(Exact(config), config)
    draws = objective.sample((4000, 1, 1, 1), steps=steps, generator=torch.Generator().manual_seed(1))
    assert draws.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert draws.std().item() == pytest.approx(STD, abs=0.03)


def test_the_loss_of_a_preconditioned_network_is_the_weighted_loss_of_its_denoiser():
    # EDM, table 1: (sigma^2 + data_std^2) / (sigma data_std)^2 times the square error of the image.
    config = DenoisingConfig(schedule=EDM(), prediction="edm", times=LogNormalNoise())
    model, given = Given(), batch(64)
    torch.manual_seed(3)
    loss = Denoising(model, config)(given)
    x_in, condition, _ = model.given[0]
    sigma = (4 * condition).exp().view(-1, 1, 1, 1)
    denoised = 0.25 / (sigma**2 + 0.25) * (x_in * (sigma**2 + 0.25).sqrt())  # the network's output is zero
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = (weight * (denoised - given["images"]) ** 2).sum()
    assert torch.allclose(loss, expected, rtol=1e-4)


def test_clipping_bounds_what_the_sampler_takes_for_the_image():
    config = DenoisingConfig(schedule=Betas(), prediction="x0")
    objective = Denoising(Given(), config)
    nn.init.constant_(objective.model.value, 7.0)
    assert torch.equal(objective.sample((2, 1, 3, 3), steps=3), torch.ones(2, 1, 3, 3))
    free = Denoising(objective.model, DenoisingConfig(schedule=Betas(), prediction="x0", clip=False))
    assert torch.allclose(free.sample((2, 1, 3, 3), steps=3), torch.full((2, 1, 3, 3), 7.0))


def test_class_labels_are_passed_dropped_and_guided():
    model = Given()
    torch.manual_seed(0)
    Denoising(model, DenoisingConfig(label_dropout=0.25))(batch(8000))
    dropped = (model.given[-1][2] == 3).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.02)
    objective = Denoising(model)
    objective.sample((2, 1, 3, 3), steps=1, labels=torch.tensor([0, 2]), guidance=2.0)
    assert model.given[-1][2].tolist() == [0, 2, 3, 3]
    objective.sample((2, 1, 3, 3), steps=1)
    assert model.given[-1][2].tolist() == [3, 3]


def test_what_is_drawn_for_an_image_depends_on_its_number_alone():
    model = Given()
    objective = Denoising(model, DenoisingConfig(label_dropout=0.25))
    images = batch(12, side=3)
    objective({**images, "position": torch.arange(5, 17)})
    torch.rand(3)
    objective({**{name: value[4:] for name, value in images.items()}, "position": torch.arange(9, 17)})
    for whole, part in zip(*model.given, strict=True):
        assert torch.equal(whole[4:], part)
    objective({**images, "position": torch.arange(6, 18)})
    assert not (model.given[2][0] == model.given[0][0]).any()


def test_the_network_gets_the_schedules_condition():
    model = Given()
    Denoising(model, DenoisingConfig(schedule=EDM(), prediction="edm")).sample((1, 1, 2, 2), steps=3)
    sigma = EDM().coefficients(torch.tensor([1, 0.5, 0], dtype=torch.float64))[1]
    assert [t.item() for _, t, _ in model.given] == pytest.approx((sigma.log() / 4).tolist(), rel=1e-5)


@pytest.mark.parametrize(("factor", "measured"), [(2, 0.249), (4, 0.0619), (8, 0.0155)])
def test_a_zero_predictor_of_noise_has_an_error_of_one_over_the_square_of_the_pooling(factor, measured):
    noise = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = multiscale_loss(noise, (64 // factor,)).mean().item() * (64 // factor)
    # The mean of 64 * 3 * (64 / factor)^2 squares: 4 standard errors.
    error = 4 * (2 / (64 * 3 * (64 / factor) ** 2)) ** 0.5
    assert found == pytest.approx(1 / factor**2, rel=error)
    assert measured == pytest.approx(1 / factor**2, rel=0.02)


def test_the_multiscale_loss_is_the_sum_over_resolutions():
    error = torch.randn(5, 2, 12, 12, generator=torch.Generator().manual_seed(1))
    parts = []
    for resolution in (3, 6, 12):
        side = 12 // resolution
        pooled = error.view(5, 2, resolution, side, resolution, side).mean((3, 5))
        parts.append(pooled.square().mean((1, 2, 3)) / resolution)
    assert torch.allclose(multiscale_loss(error, (3, 6, 12)), sum(parts), rtol=1e-5)
    model = Given()
    torch.manual_seed(2)
    loss = Denoising(model, DenoisingConfig(resolutions=(4,)))(batch(16, side=4))
    torch.manual_seed(2)
    assert torch.allclose(4 * loss, Denoising(model, DenoisingConfig())(batch(16, side=4)), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DenoisingConfig(prediction="noise"), "prediction must be one of"),
        (lambda: DenoisingConfig(sampler="dim"), "did you mean 'ddim'"),
        (lambda: DenoisingConfig(resolutions=(0,)), "resolutions must be an integer"),
        (lambda: DenoisingConfig(data_std=0.0), "data_std must be"),
        (lambda: multiscale_loss(torch.ones(1, 1, 8, 8), (3,)), "resolutions must divide"),
        (lambda: Denoising(Given()).sample((1, 1, 2, 2), steps=0), "steps must be"),
    ],
)
def test_invalid_arguments_raise(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_an_upsampled_image_is_clipped_behind_its_guidance():
    model = Given()
    objective = Denoising(model, DenoisingConfig(schedule=Cosine(limit=15.0), prediction="x0", sampler="ddim"))
    with torch.no_grad():
        model.value.fill_(0.9)
    images = objective.sample((2, 1, 4, 4), steps=3, generator=torch.Generator().manual_seed(0), upsample=2)
    torch.testing.assert_close(images, torch.full((2, 1, 4, 4), 0.9))
    assert {given[0].shape[-1] for given in model.given} == {2, 4}
