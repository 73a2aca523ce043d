"""SiD: its gradient theory on normal data, the isolation of the players, and a teacher that comes from a run."""

import math
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from danlu import config as configs
from danlu._draws import derived
from danlu.claims.objectives.sid import players
from danlu.config import Pretrained
from danlu.data import ImagesConfig
from danlu.diffusion import EDM, Cosine, LogNormalNoise
from danlu.objectives import Denoising, DenoisingConfig, FlowMatchingConfig, SiD, SiDConfig, evaluate, generator_loss
from danlu.optim import AdamWConfig, WarmupStableDecay
from danlu.train import RunConfig, TrainConfig, load_objective, run

# --- the toy of the derivation: data N(0, S^2), x_g = mu + k z, x_t = a x_g + b eps ---------------------------------


def predicted_noise(x, a, b, mean, std):
    """E[eps | x_t] for normal data."""
    return b / (a**2 * std**2 + b**2) * (x - a * mean)


def losses(mu, k, psi_mu, psi_k, *, S=1.0, a=1.0, b=0.5, nodes=40):
    """L1 to L4 by quadrature over z and eps, exact for their polynomials of second degree; differentiable."""
    points, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(nodes))
    weight = weights[:, None] * weights / (2 * math.pi)
    z, eps = points[:, None].expand(nodes, nodes), points.expand(nodes, nodes)
    x = a * (mu + k * z) + b * eps
    phi, psi = predicted_noise(x, a, b, 0.0, S), predicted_noise(x, a, b, psi_mu, psi_k)

    def mean(value):
        return (weight * value).sum()

    return {
        1: mean((phi - psi) ** 2),
        2: mean((phi - psi) * (phi - eps)),
        3: mean(phi**2 - 2 * phi * eps + psi * eps),
        4: mean((phi - eps) ** 2 - (psi - eps) ** 2),
    }


def gradient(combine, mu, k, *, frozen=True, **options):
    """The gradient in (mu, k) of a combination of L1 and L2, with psi at its optimum and held there, or following."""
    point = torch.tensor([mu, k], dtype=torch.float64, requires_grad=True)
    psi = point.detach() if frozen else point
    found = losses(point[0], point[1], psi[0], psi[1], **options)
    return torch.autograd.grad(combine(found), point)[0].tolist()


def test_the_four_losses_are_equal_at_the_best_student():
    for mu, k in ((1.0, 0.5), (-2.0, 3.0), (0.3, 1.0)):
        mu, k = torch.tensor(mu, dtype=torch.float64), torch.tensor(k, dtype=torch.float64)
        values = losses(mu, k, mu, k)
        assert all(v.item() == pytest.approx(values[1].item(), abs=1e-12) for v in values.values())
        apart = losses(mu, k, mu + 0.3, k)
        assert apart[2].item() != pytest.approx(apart[1].item(), abs=1e-2)


@pytest.mark.parametrize(("mu", "k"), [(1.0, 0.5), (1.0, 5.0), (-0.4, 1.3)])
def test_alpha_one_half_is_half_the_true_gradient(mu, k):
    true = gradient(lambda L: L[1], mu, k, frozen=False)
    half = gradient(lambda L: L[2] - L[1] / 2, mu, k)
    fourth = gradient(lambda L: L[4], mu, k)
    assert half == pytest.approx([value / 2 for value in true], rel=1e-9)
    assert fourth == pytest.approx(true, rel=1e-9)


@pytest.mark.parametrize(
    ("k", "alpha", "expected"),
    [
        (0.5, 0.0, (-0.08, -0.24)),
        (0.5, 0.5, (0.16, -0.42)),
        (0.5, 1.0, (0.4, -0.6)),
        (0.5, 1.2, (0.496, -0.672)),
        (5.0, 1.2, (-0.0529, -0.2138)),
    ],
)
def test_the_gradients_of_the_table(k, alpha, expected):
    assert gradient(lambda L: L[2] - alpha * L[1], 1.0, k) == pytest.approx(expected, abs=5e-5)


def test_the_true_gradients_of_the_table():
    assert gradient(lambda L: L[1], 1.0, 0.5, frozen=False) == pytest.approx((0.32, -0.84), abs=1e-9)
    assert gradient(lambda L: L[1], 1.0, 5.0, frozen=False) == pytest.approx((0.32, 1.596), abs=5e-4)


def test_the_signs_of_the_gradients():
    for k in (0.2, 0.5, 0.9, 1.5, 4.0):
        c, d = 0.5 / 1.25, 0.5 / (k**2 + 0.25)
        one = gradient(lambda L: L[1], 1.0, k)
        two = gradient(lambda L: L[2], 1.0, k)
        full = gradient(lambda L: L[2] - L[1], 1.0, k)
        assert one == pytest.approx((2 * c * (c - d), 2 * k * (c - d) ** 2), abs=1e-12)
        assert two == pytest.approx((c * (2 * c - d), 2 * k * c * (c - d)), abs=1e-12)
        assert full == pytest.approx((c * d, 2 * k * d * (c - d)), abs=1e-12)
        assert (one[0] < 0) == (k < 1)  # towards larger mu, away from the data, whenever the student is narrower
        assert one[1] >= 0  # towards a narrower student, always
        assert full[0] > 0
        assert (full[1] < 0) == (k < 1)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_the_players_reach_the_data(alpha):
    mu, k = players(alpha)
    # Simulations of these players with 256 samples a step end at mu of 0.115, 0.062, 0.046, 0.043 and at k of 1.000.
    assert abs(mu) < 0.2
    assert abs(k - 1) < 0.01


def test_l1_alone_diverges():
    assert abs(players(None)[0]) > 10


def test_the_players_gradients_are_those_of_the_loss():
    # One step of the simulation, against automatic differentiation of the loss by quadrature.
    points, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(61))
    z, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(5))
    weight = (weights[:, None, None] * w[:, None] * w) / (weights.sum() * w.sum() ** 2)
    b = torch.exp(-1.2 + 1.2 * points)[:, None, None]
    for alpha in (0.3, None):
        theta = torch.tensor([3.0, 0.3], dtype=torch.float64, requires_grad=True)
        x_g = theta[0] + theta[1] * z[:, None]
        x = x_g + b * z
        f_phi, f_psi = x / (1 + b**2), 3.0 + 0.09 / (0.09 + b**2) * (x - 3.0)
        x_g = x_g.expand_as(x)
        rows = [v.reshape(-1, 1) for v in (f_phi, f_psi, x_g)]
        if alpha is None:
            loss = generator_loss(*rows, 0.0, normalise=False) - generator_loss(*rows, 1.0, normalise=False)
        else:
            loss = generator_loss(*rows, alpha, normalise=False)
        total = (weight.flatten() * loss / b.expand_as(x).flatten() ** 2).sum()
        slope = torch.autograd.grad(total, theta)[0].tolist()
        mu, k = players(alpha, steps=1, rate=1e-3)
        assert [(3.0 - mu) / 1e-3, (0.3 - k) / 1e-3] == pytest.approx(slope, rel=1e-8)


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [1.0, 0.6])
def test_the_loss_of_images_is_the_loss_of_noises_times_the_ratio_of_noise_to_signal(a):
    generator = torch.Generator().manual_seed(0)
    x_g, eps, phi, psi = torch.randn(4, 13, 1, 3, 5, generator=generator, dtype=torch.float64)
    b, alpha = 0.37, 1.2
    x = a * x_g + b * eps
    f_phi, f_psi = (x - b * phi) / a, (x - b * psi) / a
    in_images = generator_loss(f_phi, f_psi, x_g, alpha, normalise=False)
    in_noises = ((phi - psi) * ((phi - eps) - alpha * (phi - psi))).flatten(1).mean(1)
    assert torch.allclose(in_images * a**2 / b**2, in_noises, rtol=0, atol=1e-12)


def test_normalising_divides_by_a_constant():
    f_phi, f_psi = torch.randn(2, 7, 2, 3, dtype=torch.float64)
    x_g = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    scale = (x_g - f_phi).detach().abs().mean((1, 2))
    plain = generator_loss(f_phi, f_psi, x_g, 1.0, normalise=False)
    assert torch.allclose(generator_loss(f_phi, f_psi, x_g, 1.0) * scale, plain)
    slope = torch.autograd.grad(generator_loss(f_phi, f_psi, x_g, 1.0).sum(), x_g)[0]
    assert torch.allclose(slope, torch.autograd.grad((plain / scale).sum(), x_g)[0])
    # Where the teacher is exact the divisor is bounded.
    assert torch.isfinite(generator_loss(f_phi, f_psi, f_phi, 1.0)).all()


# --- the objective -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NetConfig:
    width: int = 8
    num_classes: int = 0

    def build(self, **others):
        return Net(self)


class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_classes = config.num_classes
        self.into = nn.Conv2d(1, config.width, 3, padding=1)
        self.condition = nn.Linear(1, config.width)
        self.table = nn.Embedding(config.num_classes + 1, config.width)
        self.out = nn.Conv2d(config.width, 1, 3, padding=1)

    def forward(self, x, t, classes=None, r=None):
        condition = self.condition(t[:, None])
        if classes is not None:
            condition = condition + self.table(classes)
        return self.out(torch.tanh(self.into(x) + condition[:, :, None, None]))


EDM_TEACHER = DenoisingConfig(
    schedule=EDM(), prediction="edm", times=LogNormalNoise(), sampler="heun", clip=False, label_dropout=0.0
)


def distilled(denoising=EDM_TEACHER, classes=3, **options):
    torch.manual_seed(0)
    teacher = Denoising(Net(NetConfig(num_classes=classes)), denoising)
    config = SiDConfig(teacher=Pretrained(run="somewhere"), denoising=denoising, **options)
    return SiD(Net(NetConfig(num_classes=classes)), config, teacher=teacher), teacher


def batch(size=6):
    return {"images": torch.zeros(size, 1, 5, 7), "labels": torch.arange(size) % 3}


@pytest.mark.parametrize("denoising", [EDM_TEACHER, DenoisingConfig(schedule=Cosine(limit=12.0))], ids=["edm", "vp"])
def test_all_three_start_as_the_teacher_and_only_two_are_trained(denoising):
    objective, teacher = distilled(denoising)
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(objective.model.state_dict()[name], value)
        assert torch.equal(objective.student.state_dict()[name], value)
    assert {name.partition(".")[0] for name in objective.state_dict()} == {"model", "student"}
    assert not any(parameter.requires_grad for parameter in objective.teacher.parameters())
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        objective(batch()).backward()
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())
    assert not torch.equal(objective.model.out.weight, teacher.model.out.weight)
    assert not torch.equal(objective.student.out.weight, objective.model.out.weight)


def test_no_gradient_of_one_player_reaches_the_other():
    objective, _ = distilled()
    with torch.no_grad():  # apart, or the generator's loss is zero
        objective.student.out.weight.add_(0.3)
    classes = objective._classes(batch())
    x_g = objective.generate(torch.randn(6, 1, 5, 7), classes)
    f_phi, f_psi = objective._denoised(x_g, classes, torch.arange(6))
    generator_loss(f_phi, f_psi, x_g, 1.2).sum().backward()
    assert all(parameter.grad is None for parameter in objective.student.parameters())
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    assert objective.model.out.weight.grad.abs().max() > 0
    # And the sum of both losses gives the student what its own loss gives.
    objective.zero_grad(set_to_none=True)
    keys = torch.arange(len(batch()["images"]))
    objective({**batch(), "position": keys}).backward()
    complete = objective.student.out.weight.grad.clone()
    objective.zero_grad(set_to_none=True)
    from danlu.objectives.denoising import prediction_error

    apart = derived(keys, "student")
    with torch.no_grad():
        made = objective.generate(objective._noise(batch(), apart), classes)
    error = prediction_error(objective.student, EDM_TEACHER, made, classes, keys=apart)
    error.square().mean((1, 2, 3)).sum().backward()
    assert torch.allclose(objective.student.out.weight.grad, complete, rtol=1e-5, atol=1e-7)
    assert objective.model.out.weight.grad is None


def test_the_generator_learns_from_its_own_loss_alone():
    objective, _ = distilled()
    with torch.no_grad():
        objective.student.out.weight.add_(0.3)
    keys = torch.arange(len(batch()["images"]))
    objective({**batch(), "position": keys}).backward()
    found = {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}
    objective.zero_grad(set_to_none=True)
    classes = objective._classes(batch())
    x_g = objective.generate(objective._noise(batch(), keys), classes)
    f_phi, f_psi = objective._denoised(x_g, classes, keys)
    generator_loss(f_phi, f_psi, x_g, objective.config.alpha).sum().backward()
    for name, value in found.items():
        torch.testing.assert_close(value, objective.model.get_parameter(name).grad, rtol=1e-5, atol=1e-7)


def test_the_generators_gradient_goes_through_both_scores():
    # By hand on one draw: x_t depends on theta, and both networks pass it on.
    objective, _ = distilled()
    with torch.no_grad():
        objective.student.out.weight.add_(0.3)
    x_g = torch.randn(6, 1, 5, 7, requires_grad=True)
    f_phi, f_psi = objective._denoised(x_g, None, torch.arange(6))
    for seen in (f_phi, f_psi):
        slope = torch.autograd.grad(seen.sum(), x_g, retain_graph=True)[0]
        assert slope.abs().max() > 0


def test_the_generator_is_the_teachers_denoiser_at_one_level():
    objective, _ = distilled()
    z = torch.randn(6, 1, 5, 7)
    sigma = 2.5
    output = objective.model(0.3922323 * sigma * z, torch.full((6,), math.log(sigma) / 4), None)
    expected = 0.0384615 * sigma * z + 0.4902903 * output
    assert torch.allclose(objective.generate(z, None), expected, rtol=0, atol=1e-5)


def test_scores_are_compared_at_edms_levels_on_any_schedule(monkeypatch):
    for denoising in (EDM_TEACHER, DenoisingConfig(schedule=Cosine())):
        objective, _ = distilled(denoising, t_max=0.8)
        seen = []
        schedule = denoising.schedule
        monkeypatch.setattr(type(schedule), "noised", lambda self, x, eps, t, seen=seen: seen.append(t) or x)
        objective._denoised(torch.zeros(2000, 1, 5, 7), None, torch.arange(2000))
        monkeypatch.undo()
        ratio = (-schedule.logsnr(seen[0].double()) / 2).exp()
        assert ratio.max().item() <= 24.41
        assert ratio.max().item() > 23
        assert ratio.min().item() == pytest.approx(0.002, rel=0.1)


def test_the_gap_is_zero_where_the_student_is_the_teacher():
    objective, _ = distilled()
    assert objective.metrics() == {}
    objective(batch())
    assert objective.metrics() == {"score_gap": pytest.approx(0, abs=1e-6)}
    values = [evaluate(objective, [batch(), batch(2)]) for _ in range(2)]
    assert values[0] == values[1] == {"val_loss": pytest.approx(0, abs=1e-6)}


def test_sampling_takes_one_step_and_no_guidance_and_needs_no_teacher():
    objective = SiD(Net(NetConfig()), SiDConfig(teacher=Pretrained(run="gone"), denoising=EDM_TEACHER))
    draws = [
        objective.sample((3, 1, 5, 7), steps=1, generator=torch.Generator().manual_seed(0), trajectory=way)
        for way in (False, True)
    ]
    assert torch.equal(draws[0], draws[1][-1])
    with pytest.raises(ValueError, match="steps must be 1, got 2"):
        objective.sample((3, 1, 5, 7), steps=2)
    with pytest.raises(ValueError, match="guidance must be None for SiD"):
        objective.sample((3, 1, 5, 7), guidance=2.0)
    with pytest.raises(RuntimeError, match="has no teacher"):
        objective(batch())


def test_a_teacher_of_another_kind_raises():
    teacher = Denoising(Net(NetConfig()), EDM_TEACHER)
    config = SiDConfig(teacher=Pretrained(run="there"), denoising=EDM_TEACHER)
    with pytest.raises(ValueError, match=r"into\.weight is \(8, 1, 3, 3\) there and \(9, 1, 3, 3\) here"):
        SiD(Net(NetConfig(width=9)), config, teacher=teacher)
    with pytest.raises(ValueError, match="denoising must be the teacher's own"):
        SiD(Net(NetConfig()), replace(config, denoising=DenoisingConfig()), teacher=teacher)
    with pytest.raises(TypeError, match="must be a run with the objective Denoising, got Linear"):
        SiD(Net(NetConfig()), config, teacher=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="alpha must be"):
        replace(config, alpha=-1.0)


# --- the teacher is a run ------------------------------------------------------------------------------------------


def recipe(objective, **train):
    pytest.importorskip("sklearn")
    return RunConfig(
        recipe="test",
        model=NetConfig(),
        objective=objective,
        data=ImagesConfig(source="digits8", batch=8),
        optim=AdamWConfig(lr=1e-3),
        schedule=WarmupStableDecay(),
        train=TrainConfig(steps=2, eval_every=2, eval_batches=1, precision="float32", threads=1, ema=0.9, **train),
    )


def test_a_run_distils_another_run_by_the_name_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.train(recipe(EDM_TEACHER), "teacher", quiet=True) == 0
    config = recipe(SiDConfig(teacher=Pretrained(run="teacher"), denoising=EDM_TEACHER))
    assert config.objective.teacher.run == str(tmp_path / "teacher")
    assert configs.loads(RunConfig, configs.dumps(config)) == config
    parts = run.assemble(config)
    averaged, _ = load_objective("teacher")
    assert isinstance(averaged, Denoising)
    assert torch.equal(parts.objective.teacher.out.weight, averaged.model.out.weight)
    assert run.train(config, "student", quiet=True) == 0
    assert run.evaluate("student")["val_loss"] == pytest.approx(run.evaluate("student")["val_loss"])
    assert run.resume("student", quiet=True) == 0
    # The distilled run stands alone: what made it may be gone.
    os.rename("teacher", "elsewhere")
    made, _ = load_objective("student")
    images = made.sample((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, 1, 8, 8)
    with pytest.raises(FileNotFoundError, match=r"teacher is not a run folder: no such folder"):
        run.assemble(config)


def test_a_run_of_another_objective_is_no_teacher(tmp_path):
    assert run.train(recipe(FlowMatchingConfig(), tensorboard=False), tmp_path / "flow", quiet=True) == 0
    with pytest.raises(TypeError, match="must be a run with the objective Denoising, got FlowMatching"):
        run.assemble(recipe(SiDConfig(teacher=Pretrained(run=str(tmp_path / "flow")), denoising=EDM_TEACHER)))


def test_a_pretrained_run_must_be_named():
    with pytest.raises(ValueError, match="run must be the folder"):
        Pretrained(run="")
