"""Flow matching: its minimiser on normal data, what the network is given, and sampling."""

import pytest
import torch
from torch import nn

from danlu._draws import normal, uniform
from danlu.diffusion import LogitNormalTimes
from danlu.objectives import FlowMatching, FlowMatchingConfig, evaluate

MEAN, STD = 0.3, 0.7


class Exact(nn.Module):
    """The velocity of normal data; ``shift`` is added to it."""

    num_classes = 0

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x, t, classes=None, r=None):
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * STD**2 + t**2
        slope = (t - (1 - t) * STD**2) / variance
        return -MEAN + slope * (x - (1 - t) * MEAN) + self.shift


class Recorder(nn.Module):
    """Keeps the times and class labels that it was given."""

    num_classes = 5

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x, t, classes=None, r=None):
        self.seen.append((t, classes))
        return self.weight * classes.view(-1, 1, 1, 1).to(x.dtype).expand_as(x)


def batch(size=4096, seed=0, shape=(1, 1, 3)):
    generator = torch.Generator().manual_seed(seed)
    images = MEAN + STD * torch.randn(size, *shape, generator=generator)
    return {"images": images, "labels": torch.randint(5, (size,), generator=generator)}


def test_the_velocity_of_normal_data_is_a_stationary_point():
    torch.manual_seed(0)
    objective = FlowMatching(Exact())
    gradients = []
    for seed in range(8):
        objective.zero_grad()
        (objective(batch(seed=seed)) / 4096).backward()
        gradients.append(objective.model.shift.grad.item())
    mean, error = torch.tensor(gradients).mean().item(), torch.tensor(gradients).std().item() / 8**0.5
    assert abs(mean) < 4 * error
    # A wrong velocity has a gradient: 2 shift.
    wrong = FlowMatching(Exact(shift=0.2))
    (wrong(batch()) / 4096).backward()
    assert wrong.model.shift.grad.item() == pytest.approx(0.4, abs=0.05)


def test_the_loss_is_a_sum_over_images_of_a_mean_over_components():
    position = torch.arange(64)
    data = {**batch(64), "position": position}
    objective = FlowMatching(Exact())
    assert objective.denominator(data).item() == 64
    loss = objective(data)
    t = uniform(position, "times")
    noise = normal(position, "noise", 1, 1, 3)
    rows = t.view(-1, 1, 1, 1)
    x = (1 - rows) * data["images"] + rows * noise
    expected = (objective.model(x, t) - (noise - data["images"])).square().mean((1, 2, 3)).sum()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, expected, rtol=1e-6)


def test_a_share_of_the_images_loses_its_class_and_the_others_keep_it():
    torch.manual_seed(0)
    model = Recorder()
    given = batch(20_000)
    FlowMatching(model, FlowMatchingConfig(label_dropout=0.3, times=LogitNormalTimes()))(given)
    _, classes = model.seen[0]
    dropped = classes == 5
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.013)  # 4 standard errors
    assert torch.equal(classes[~dropped], given["labels"][~dropped])


def test_evaluation_repeats_itself_and_gives_random_numbers_back():
    objective = FlowMatching(Exact()).train()
    before = torch.get_rng_state()
    values = [evaluate(objective, [batch(100), batch(37, seed=1)]) for _ in range(2)]
    assert values[0] == values[1]
    assert objective.training
    assert torch.equal(torch.get_rng_state(), before)
    assert set(values[0]) == {"val_loss"}
    with pytest.raises(ValueError, match="must hold images"):
        evaluate(objective, [])


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_samples_have_the_distribution_of_the_data(sampler):
    objective = FlowMatching(Exact(), FlowMatchingConfig(sampler=sampler))
    images = objective.sample((20_000, 1, 1, 1), steps=100, generator=torch.Generator().manual_seed(0))
    assert images.mean().item() == pytest.approx(MEAN, abs=0.02)
    # Euler's 100 steps narrow by about 0.009 / 0.7.
    assert images.std().item() == pytest.approx(STD, abs=0.025 if sampler == "euler" else 0.015)


def test_sampling_repeats_by_seed_guides_and_shows_its_way():
    objective = FlowMatching(Recorder())
    labels = torch.tensor([1, 4, 5])

    def draw(**options):
        generator = torch.Generator().manual_seed(3)
        return objective.sample((3, 1, 5, 7), steps=4, generator=generator, labels=labels, **options)

    states = draw(trajectory=True)
    assert states.shape == (5, 3, 1, 5, 7)
    assert torch.equal(states[-1], draw())
    # One constant velocity for each class: guidance by w goes to 5 + w (label - 5).
    noise = states[0]
    expected = noise - (5 + 2.0 * (labels - 5)).view(-1, 1, 1, 1)
    assert torch.allclose(draw(guidance=2.0), expected, rtol=0, atol=1e-5)
    assert torch.allclose(draw(guidance=1.0), draw(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"shape": (3, 1, 5)}, "shape must be"),
        ({"shape": (3, 0, 5, 7)}, "channels must be"),
        ({"labels": torch.tensor([0, 1])}, "labels must be 3 integers"),
        ({"labels": torch.tensor([0, 1, 6])}, "labels must be 3 integers from 0 to 5"),
        ({"guidance": 2.0}, "guidance 2.0 needs labels"),
    ],
)
def test_what_cannot_be_sampled_is_rejected(options, said):
    with pytest.raises(ValueError, match=said):
        FlowMatching(Recorder()).sample(**{"shape": (3, 1, 5, 7), "steps": 2, **options})


def test_labels_for_a_model_without_classes_are_rejected():
    with pytest.raises(ValueError, match="without classes"):
        FlowMatching(Exact()).sample((1, 1, 1, 1), steps=1, labels=torch.tensor([0]))


def test_upsampled_images_vary_in_their_averages_as_the_small_images_do():
    objective, generator = FlowMatching(Exact()), torch.Generator().manual_seed(2)

    def spread(upsample):
        images = objective.sample((512, 1, 6, 6), steps=40, generator=generator, upsample=upsample)
        return float(torch.nn.functional.avg_pool2d(images, 3).std())

    # Independent pixels: unguided, an average of nine has a third of their standard deviation.
    assert spread(1) == pytest.approx(STD / 3, rel=0.1)
    assert spread(3) == pytest.approx(STD, rel=0.3)
