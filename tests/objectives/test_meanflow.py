"""MeanFlow against its closed form on normal data, and every part of its training rule by itself."""

import pytest
import torch
from torch import nn

from danlu.diffusion import LogNormalNoise, UniformTimes
from danlu.objectives import MeanFlow, MeanFlowConfig, evaluate, total_derivative
from danlu.objectives.draws import keys_of

MEAN, STD = 0.3, 0.7


def drawn(objective, batch):
    """What a training batch is drawn to, by the same number of torch's generator."""
    return objective._draw(batch, keys_of(batch, batch["images"]), objective._share)


def spread(t):
    return torch.sqrt((1 - t) ** 2 * STD**2 + t**2)


def velocity(x, t):
    slope = (t - (1 - t) * STD**2) / spread(t) ** 2
    return -MEAN + slope * (x - (1 - t) * MEAN)


def average(x, t, r):
    return -MEAN + (spread(t) - spread(r)) / (t - r) * (x - (1 - t) * MEAN) / spread(t)


class Small(nn.Module):
    """A network of images that knows both times, dropout-free unless asked."""

    def __init__(self, classes=0, dropout=0.0, width=11):
        super().__init__()
        self.num_classes = classes
        self.into = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width)
        self.times = nn.Linear(2, width)
        self.table = nn.Embedding(classes + 1, width)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Conv2d(width, 2, 3, padding=1)
        self.calls = []

    def forward(self, x, t, classes=None, r=None):
        self.calls.append((len(x), None if classes is None else classes.clone(), torch.is_grad_enabled()))
        condition = self.times(torch.stack([t, t - r], dim=1))
        if classes is not None:
            condition = condition + self.table(classes)
        hidden = nn.functional.silu(self.norm(self.into(x)) + condition[:, :, None, None])
        return self.out(self.drop(hidden))


def images(size=13, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randn(size, 2, 5, 7, generator=generator, dtype=dtype),
        "labels": torch.randint(3, (size,), generator=generator),
    }


def network(**options):
    torch.manual_seed(0)
    return Small(**options).double()


def full_batch_loss(model, draw, *, power=1.0, offset=1e-2):
    """The paper's form: the derivative of every row, the weight by hand."""
    x, t, r, classes, v, _ = draw
    u, slope = torch.func.jvp(
        lambda x, t, r: model(x, t, classes, r), (x, t, r), (v, torch.ones_like(t), torch.zeros_like(r))
    )
    target = (v - (t - r).view(-1, 1, 1, 1) * slope).detach()
    square = (u - target).square().flatten(1).sum(1)
    return (square / (square.detach() + offset) ** power).sum()


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def test_the_closed_form_satisfies_the_identity_to_1e_8():
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(997, generator=generator, dtype=torch.float64)
    t, r = torch.rand(2, 997, generator=generator, dtype=torch.float64).sort(0, descending=True).values
    u, slope = total_derivative(average, x, t, r, velocity(x, t))
    residual = u + (t - r) * slope - velocity(x, t)
    assert residual.abs().max().item() < 1e-8


def test_the_closed_form_has_the_published_values():
    one = torch.ones((), dtype=torch.float64)
    assert velocity(1.1 * one, 0.6 * one).item() == pytest.approx(0.6031022, abs=5e-8)
    # Two steps make one: (t - r) u(t, r) = (s - r) u(s, r) + (t - s) u(t, s) along the flow.
    x, t, s, r = (value * one for value in (1.1, 0.9, 0.5, 0.1))
    x_s = x - (t - s) * average(x, t, s)
    in_one = (t - r) * average(x, t, r)
    parts = (s - r) * average(x_s, s, r) + (t - s) * average(x, t, s)
    # Worked out by hand: 1.07 (s_t - s_r) / s_t - 0.24 with s_t^2 = 0.8149 and s_r^2 = 0.4069.
    assert in_one.item() == pytest.approx(1.07 * (1 - (0.4069 / 0.8149) ** 0.5) - 0.24, abs=1e-14)
    assert in_one.item() == pytest.approx(0.073906571, abs=1e-9)
    assert parts.item() == pytest.approx(in_one.item(), abs=1e-14)


@pytest.mark.parametrize("tangent", [(1, 0, 0), (1, 0, 1), (1, 1, 1)])
def test_a_wrong_tangent_breaks_the_identity(tangent):
    # Order (x, t, r); the right one is (v, 1, 0).
    x = torch.linspace(-2, 2, 97, dtype=torch.float64)
    t, r = torch.full_like(x, 0.8), torch.full_like(x, 0.3)
    v = velocity(x, t)
    weights = [c * d for c, d in zip(tangent, (v, torch.ones_like(t), torch.ones_like(r)), strict=True)]
    u, slope = torch.func.jvp(average, (x, t, r), tuple(weights))
    assert (u + (t - r) * slope - v).abs().max().item() > 0.05


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("power", [0.0, 1.0, 0.5])
def test_derivatives_of_some_rows_give_the_loss_and_gradient_of_the_full_batch(share, power):
    model = network(classes=3)
    objective = MeanFlow(model, MeanFlowConfig(share=share, power=power)).double()
    torch.manual_seed(1)
    loss = objective(images())
    found = gradients(model, loss)
    torch.manual_seed(1)
    draw = drawn(objective, images())
    expected_loss = full_batch_loss(model, draw, power=power)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    for one, other in zip(found, gradients(model, expected_loss), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


class Straight(nn.Module):
    """The image in which a straight step of a network's velocity would end."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.num_classes = inner, inner.num_classes

    def forward(self, x, t, classes=None, r=None):
        return x - t.view(-1, 1, 1, 1) * self.inner(x, t, classes, r)


@pytest.mark.parametrize("form", ["meanflow", "marginal", "full"])
def test_a_network_of_images_is_trained_as_the_network_of_its_velocities(form):
    def trained(prediction, made):
        model = network(classes=3)
        times = LogNormalNoise(mean=1.0, std=0.5)  # t above 0.05
        config = MeanFlowConfig(prediction=prediction, form=form, share=0.5, times=times, kappa=0.3)
        torch.manual_seed(1)
        loss = MeanFlow(made(model), config).double()(images())
        return [loss.detach(), *gradients(model, loss)]

    for one, other in zip(trained("velocity", lambda net: net), trained("x0", Straight), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_one_step_of_a_network_of_images_is_its_output():
    objective = MeanFlow(network().float(), MeanFlowConfig(prediction="x0"))
    found = objective.sample((3, 2, 5, 7), steps=1, generator=torch.Generator().manual_seed(8))
    noise = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        expected = objective.model(noise, torch.ones(3), None, torch.zeros(3))
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_the_derivative_is_computed_for_the_rows_with_two_times_only():
    model = network()
    MeanFlow(model, MeanFlowConfig(share=0.25))(images(12))
    assert [(size, grad) for size, _, grad in model.calls] == [(3, False), (12, True)]
    model.calls.clear()
    MeanFlow(model, MeanFlowConfig(share=0.0))(images(12))
    assert [(size, grad) for size, _, grad in model.calls] == [(12, True)]


def test_the_target_is_held_constant():
    # d loss / d theta is 2 (u - u_target) du / d theta.
    model = network()
    objective = MeanFlow(model, MeanFlowConfig(share=1.0, power=0.0))
    torch.manual_seed(2)
    found = gradients(model, objective(images()))
    torch.manual_seed(2)
    x, t, r, classes, v, _ = drawn(objective, images())
    _, slope = total_derivative(lambda x, t, r: model(x, t, classes, r), x, t, r, v)
    u = model(x, t, classes, r)
    weight = 2 * (u - (v - (t - r).view(-1, 1, 1, 1) * slope)).detach()
    expected = torch.autograd.grad(u, list(model.parameters()), weight, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["meanflow", "marginal", "full"])
def test_with_equal_times_every_form_is_flow_matching(form):
    model = network()
    objective = MeanFlow(model, MeanFlowConfig(form=form, share=0.0, power=0.0))
    torch.manual_seed(3)
    found = gradients(model, objective(images()))
    torch.manual_seed(3)
    x, t, r, classes, v, _ = drawn(objective, images())
    assert torch.equal(t, r)
    expected = gradients(model, (model(x, t, classes, t) - v).square().sum())
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            assert torch.allclose(one, other, rtol=1e-12)


def test_the_full_form_differentiates_through_the_derivative_and_the_marginal_form_does_not():
    def expected_loss(model, draw, *, hold):
        x, t, r, classes, v, _ = draw
        own = model(x, t, classes, t)
        u, slope = total_derivative(lambda x, t, r: model(x, t, classes, r), x, t, r, own)
        slope = slope.detach() if hold else slope
        return (u + (t - r).view(-1, 1, 1, 1) * slope - v).square().sum()

    found = {}
    for form in ("marginal", "full"):
        model = network()
        objective = MeanFlow(model, MeanFlowConfig(form=form, share=1.0, power=0.0))
        torch.manual_seed(4)
        found[form] = gradients(model, objective(images()))
        torch.manual_seed(4)
        expected = gradients(model, expected_loss(model, drawn(objective, images()), hold=form == "marginal"))
        for one, other in zip(found[form], expected, strict=True):
            if other is not None:
                assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(found["marginal"][0], found["full"][0], rtol=1e-2)


def test_the_adaptive_weight_makes_every_loss_nearly_one_while_the_logged_error_is_unweighted():
    model = network()
    objective = MeanFlow(model, MeanFlowConfig(share=0.5, power=1.0, offset=0.01))
    torch.manual_seed(5)
    loss = objective(images(12)).item() / 12
    assert loss == pytest.approx(1, abs=1e-3)
    torch.manual_seed(5)
    draw = drawn(objective, images(12))
    error = objective._error(draw).detach().square().mean((1, 2, 3))
    assert objective.metrics() == {
        "average_mse": pytest.approx(error[:6].mean().item()),
        "velocity_mse": pytest.approx(error[6:].mean().item()),
    }
    per_image = error * 70
    assert loss * 12 == pytest.approx((per_image / (per_image + 0.01)).sum().item())


def test_times_are_ordered_pairs_and_the_rest_of_the_batch_keeps_one_time():
    objective = MeanFlow(network(), MeanFlowConfig(share=0.4, times=UniformTimes()))
    torch.manual_seed(6)
    draw = drawn(objective, images(5000, dtype=torch.float32))
    assert draw.apart == 2000
    assert bool((draw.t[:2000] > draw.r[:2000]).all())
    assert torch.equal(draw.t[2000:], draw.r[2000:])
    # Larger and smaller of two uniform times have means 2/3 and 1/3; both kinds of rows see the same t.
    assert draw.t.mean().item() == pytest.approx(2 / 3, abs=0.014)
    assert draw.r[:2000].mean().item() == pytest.approx(1 / 3, abs=0.022)


def test_flow_matching_comes_first_resumes_where_it_was_saved_and_evaluation_uses_the_complete_rule(caplog):
    def rows(objective):
        """Of a batch of 12: how many were differentiated."""
        objective.model.calls.clear()
        objective(images(12))
        return sum(count for count, _, grad in objective.model.calls if not grad)

    config = MeanFlowConfig(share=0.5, flow_share=0.3)
    objective = MeanFlow(network(), config, 10)
    undisturbed = MeanFlow(network(), config, 10)
    assert [rows(undisturbed) for _ in range(4)] == [0, 0, 0, 6]
    assert [rows(objective) for _ in range(2)] == [0, 0]
    assert rows(objective.eval()) == 6
    resumed = MeanFlow(network(), config, 10)
    resumed.load_state_dict(objective.state_dict())
    with caplog.at_level("WARNING"):
        resumed.float().sample((1, 2, 5, 7), steps=1)
        assert "1 batches more of flow" in caplog.text
    assert [rows(resumed.double()) for _ in range(3)] == [0, 6, 6]
    caplog.clear()
    resumed.float().sample((1, 2, 5, 7), steps=1)
    assert not caplog.text
    assert "flow_left" not in MeanFlow(network()).state_dict()
    with pytest.raises(ValueError, match=r"flow_share 0\.3 is a share of batches"):
        MeanFlow(network(), config)(images(12))


class Exact(nn.Module):
    """The average velocity of normal data, the velocity itself where the times are equal; classes do nothing."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, classes=None, r=None):
        t, r = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
        gap = torch.where(t == r, torch.ones_like(t), t - r)
        two = -MEAN + (spread(t) - spread(t - gap)) / gap * (x - (1 - t) * MEAN) / spread(t)
        return self.scale * torch.where(t == r, velocity(x, t), two)


def test_guidance_leaves_the_exact_velocity_as_it_is():
    # With u(.|c) = u(.) = v, omega v + kappa v + (1 - omega - kappa) v = v.
    for omega, kappa in ((1.0, 0.5), (2.0, 0.0), (0.2, 0.92)):
        objective = MeanFlow(Exact(), MeanFlowConfig(omega=omega, kappa=kappa, label_dropout=0.0))
        batch = images(17)
        x, t = batch["images"], torch.linspace(0.05, 0.95, 17, dtype=torch.float64)
        v = velocity(x, t.view(-1, 1, 1, 1))
        assert torch.allclose(objective._guided(x, t, batch["labels"], v), v, rtol=0, atol=1e-13)


def test_guidance_mixes_three_velocities_where_there_is_a_class_and_it_is_time():
    model = network(classes=3)
    config = MeanFlowConfig(omega=0.7, kappa=0.4, guidance_from=0.2, guidance_to=0.8)
    objective = MeanFlow(model, config)
    batch = images(17)
    x, t = batch["images"], torch.linspace(0.05, 0.95, 17, dtype=torch.float64)
    classes = batch["labels"].clone()
    classes[::4] = 3
    v = torch.randn(x.shape, dtype=torch.float64)
    found = objective._guided(x, t, classes, v)
    with torch.no_grad():
        mixed = 0.7 * v + 0.4 * model(x, t, classes, t) - 0.1 * model(x, t, torch.full_like(classes, 3), t)
    plain = (classes == 3) | (t < 0.2) | (t > 0.8)
    assert torch.equal(found[plain], v[plain])
    assert torch.allclose(found[~plain], mixed[~plain], rtol=1e-12)
    assert not found.requires_grad
    assert 0 < plain.sum() < 17


def test_the_guided_velocity_is_both_target_and_tangent():
    model = network(classes=3)
    objective = MeanFlow(model, MeanFlowConfig(omega=2.0, share=1.0, power=0.0, label_dropout=0.0))
    torch.manual_seed(7)
    loss = objective(images())
    torch.manual_seed(7)
    draw = drawn(objective, images())
    noise_less_data = draw.velocity
    assert loss.item() == pytest.approx(full_batch_loss(model, draw, power=0.0).item(), rel=1e-10)
    plain = MeanFlow(model, MeanFlowConfig(share=1.0, power=0.0, label_dropout=0.0))
    torch.manual_seed(7)
    assert not torch.allclose(drawn(plain, images()).velocity, noise_less_data)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_any_number_of_steps_of_the_exact_average_velocity_draws_the_data(steps):
    objective = MeanFlow(Exact())
    generator = torch.Generator().manual_seed(0)
    found = objective.sample((1009, 1, 3, 5), steps=steps, generator=generator)
    noise = torch.randn(1009, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    # The flow of normal data scales: noise x goes to mean + std x.
    assert torch.allclose(found.double(), MEAN + STD * noise.double(), rtol=0, atol=1e-5)


def test_two_steps_in_one_call_are_two_calls_of_one_step():
    objective = MeanFlow(network().float())
    options = {"generator": torch.Generator().manual_seed(8), "trajectory": True}
    states = objective.sample((3, 2, 5, 7), steps=2, **options)
    rows = torch.ones(3)
    with torch.no_grad():
        middle = states[0] - 0.5 * objective.model(states[0], rows, None, rows / 2)
        end = middle - 0.5 * objective.model(middle, rows / 2, None, 0 * rows)
    assert torch.allclose(states[1], middle, rtol=0, atol=1e-6)
    assert torch.allclose(states[2], end, rtol=0, atol=1e-6)


def test_the_exact_average_velocity_is_a_stationary_point():
    torch.manual_seed(9)
    objective = MeanFlow(Exact(), MeanFlowConfig(share=0.5, power=0.0, times=UniformTimes(), label_dropout=0.0))
    found = []
    for _ in range(12):
        batch = {"images": MEAN + STD * torch.randn(1000, 1, 1, 2, dtype=torch.float64)}
        found.append(gradients(objective.model, objective(batch) / 1000)[0].item())
    found = torch.tensor(found)
    assert abs(found.mean().item()) < 4 * found.std().item() / 12**0.5
    with torch.no_grad():
        objective.model.scale.mul_(1.3)
    assert gradients(objective.model, objective(batch) / 1000)[0].item() > 10 * found.std().item() / 12**0.5


def test_evaluation_is_unweighted_and_repeats_itself():
    objective = MeanFlow(network())
    values = [evaluate(objective, [images(12), images(5, seed=1)]) for _ in range(2)]
    assert values[0] == values[1]
    assert set(values[0]) == {"val_loss"}
    assert values[0]["val_loss"] > 0.5


def test_a_network_with_dropout_trains():
    objective = MeanFlow(network(dropout=0.2), MeanFlowConfig(share=0.5))
    loss = objective(images())
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MeanFlowConfig(form="paper"), "form must be one of"),
        (lambda: MeanFlowConfig(prediction="eps"), "prediction must be one of"),
        (lambda: MeanFlowConfig(share=1.5), "share must be in"),
        (lambda: MeanFlowConfig(kappa=1.0), "kappa must be in"),
        (lambda: MeanFlowConfig(guidance_from=0.5, guidance_to=0.4), "guidance_to must be in"),
        (lambda: MeanFlow(network(), MeanFlowConfig(omega=2.0)), "ask for guidance, and the model has no classes"),
        (lambda: MeanFlow(network()).sample((1, 2, 5, 7), steps=1, guidance=2.0), "sampling takes none"),
        (lambda: MeanFlow(network()).sample((1, 2, 5, 7), steps=0), "steps must be"),
    ],
)
def test_invalid_arguments_raise(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_predicted_image_divides_by_no_time_below_a_twentieth():
    objective = MeanFlow(network(), MeanFlowConfig(prediction="x0"))
    objective.model.forward = lambda x, t, classes=None, r=None: torch.zeros_like(x)
    x, t = images(4)["images"], torch.tensor([0.0, 0.01, 0.05, 0.8]).double()
    found = objective.average(x, t, None, t)
    torch.testing.assert_close(found, x / torch.tensor([0.05, 0.05, 0.05, 0.8]).double().view(4, 1, 1, 1))


def test_both_ends_of_the_guided_times_are_guided():
    objective = MeanFlow(network(classes=3), MeanFlowConfig(omega=2.0, guidance_from=0.25, guidance_to=0.75))
    batch, t = images(4), torch.tensor([0.24, 0.25, 0.75, 0.76], dtype=torch.float64)
    v = torch.ones_like(batch["images"])
    changed = (objective._guided(batch["images"], t, batch["labels"], v) != v).flatten(1).any(1)
    assert changed.tolist() == [False, True, True, False]
