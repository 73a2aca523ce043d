"""Multitask sparse parity: the samples against their definition, the network against the plain one, the bookkeeping."""

import itertools
import math

import pytest
import torch
from torch import nn

from danlu.analysis import ParityNetwork, ParityRun, parity_samples, parity_tasks, train_parity


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("g", [0.4, 1.0])
def test_shares_are_zipfs_law_over_the_finite_list(g):
    tasks = parity_tasks(50, 20, g=g)
    weights = [i ** -(g + 1) for i in range(1, 51)]
    expected = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
    torch.testing.assert_close(tasks.shares, expected, rtol=1e-13, atol=0)


def test_the_first_of_five_hundred_tasks_is_asked_by_a_third_of_the_samples():
    assert parity_tasks(500, 100, g=0.4).shares[0].item() == pytest.approx(0.345, abs=5e-4)


def test_subsets_are_distinct_and_so_are_their_bits():
    subsets = parity_tasks(100, 10).subsets
    assert subsets.shape == (100, 3)
    assert bool((subsets.diff(dim=1) > 0).all())
    assert len(subsets.unique(dim=0)) == 100
    assert 0 <= subsets.min() < subsets.max() < 10


def test_as_many_tasks_as_there_are_subsets_are_all_of_them():
    found = {tuple(subset) for subset in parity_tasks(20, 6).subsets.tolist()}
    assert found == set(itertools.combinations(range(6), 3))


def test_every_bit_is_as_likely_in_a_subset_as_any_other():
    counts = torch.stack([parity_tasks(1, 8, seed=seed).subsets[0] for seed in range(400)]).flatten().bincount()
    chi_squared = ((counts - 150.0) ** 2 / 150).sum() * (7 / 8) / (1 - 3 / 8)
    assert chi_squared < 24.3  # 99.9 % of a chi-squared of seven degrees


def test_the_label_is_the_parity_of_the_tasks_own_bits():
    tasks = parity_tasks(30, 12, size=4)
    samples = parity_samples(tasks, 500, generator())
    for task, bits, label in zip(*(column.tolist() for column in samples)):
        assert set(bits) <= {0.0, 1.0}
        assert label == sum(bits[index] for index in tasks.subsets[task].tolist()) % 2


def test_flipping_a_bit_of_the_subset_flips_the_label_and_no_other_bit_says_anything():
    tasks = parity_tasks(1, 8)
    samples = parity_samples(tasks, 20_000, generator())
    signs, label = 1 - 2 * samples.bits.double(), 1 - 2 * samples.label.double()
    subset = tasks.subsets[0].tolist()
    for size in (1, 2, 3):
        for bits in itertools.combinations(range(8), size):
            correlation = float((signs[:, list(bits)].prod(1) * label).mean())
            assert correlation == (1.0 if list(bits) == subset else pytest.approx(0, abs=5 / math.sqrt(20_000)))


def test_tasks_are_asked_by_their_shares_and_bits_and_labels_are_fair():
    tasks = parity_tasks(10, 12, g=1.0)
    samples = parity_samples(tasks, 40_000, generator())
    expected = 40_000 * tasks.shares
    chi_squared = ((samples.task.bincount(minlength=10) - expected) ** 2 / expected).sum()
    assert chi_squared < 27.9  # 99.9 % of a chi-squared of nine degrees
    tolerance = 4.5 / math.sqrt(40_000) / 2
    assert samples.bits.mean(0).tolist() == pytest.approx([0.5] * 12, abs=tolerance)
    assert samples.label.double().mean().item() == pytest.approx(0.5, abs=tolerance)


def test_tasks_that_are_given_are_the_ones_sampled():
    task = torch.tensor([4, 0, 4])
    samples = parity_samples(parity_tasks(5, 8), task, generator(), dtype=torch.float64)
    assert samples.task is task
    assert (samples.bits.shape, samples.bits.dtype, samples.label.dtype) == ((3, 8), torch.float64, torch.int64)


@pytest.mark.parametrize("width", [10, 500])
def test_the_papers_networks_have_603_parameters_per_unit_plus_two(width):
    network = ParityNetwork(500, 100, width)
    assert sum(parameter.numel() for parameter in network.parameters()) == 603 * width + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_is_the_plain_one_on_the_one_hot_task_beside_the_bits(dtype):
    tasks = parity_tasks(7, 9)
    network = ParityNetwork(7, 9, 20, generator=generator(), dtype=dtype)
    plain = nn.Sequential(nn.Linear(16, 20, dtype=dtype), nn.ReLU(), nn.Linear(20, 2, dtype=dtype))
    with torch.no_grad():
        plain[0].weight.copy_(torch.cat([network.of_task.T, network.of_bits], dim=1))
        plain[0].bias.copy_(network.bias)
        plain[2].weight.copy_(network.head)
        plain[2].bias.copy_(network.head_bias)
    samples = parity_samples(tasks, 64, generator(), dtype=dtype)
    one_hot = nn.functional.one_hot(samples.task, 7).to(dtype)
    ours = network(samples.task, samples.bits)
    theirs = plain(torch.cat([one_hot, samples.bits], dim=1))
    torch.testing.assert_close(ours, theirs)
    nn.functional.cross_entropy(ours, samples.label).backward()
    nn.functional.cross_entropy(theirs, samples.label).backward()
    torch.testing.assert_close(torch.cat([network.of_task.grad.T, network.of_bits.grad], dim=1), plain[0].weight.grad)


def test_the_start_is_that_of_torchs_linear_layers():
    network = ParityNetwork(30, 20, 400, generator=generator())
    for parameter, bound in ((network.of_task, 50**-0.5), (network.of_bits, 50**-0.5), (network.head, 0.05)):
        assert parameter.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def trained(steps=200, seed=0, dtype=torch.float32, **options):
    tasks = parity_tasks(4, 8, size=1, g=0.4)
    network = ParityNetwork(4, 8, 32, generator=generator(seed), dtype=dtype)
    settings = {"batch": 64, "lr": 1e-2, "points": 20, "seed": seed} | options
    return tasks, network, train_parity(network, tasks, steps=steps, **settings)


def test_without_weights_in_the_head_every_task_costs_one_bit():
    tasks = parity_tasks(5, 8)
    network = ParityNetwork(5, 8, 16)
    nn.init.zeros_(network.head)
    nn.init.zeros_(network.head_bias)
    run = train_parity(network, tasks, steps=1, batch=4)
    assert run.losses[0].tolist() == pytest.approx([1.0] * 5, rel=1e-7)
    assert run.mean_loss[0].item() == pytest.approx(1.0, rel=1e-7)


def test_the_losses_are_those_of_the_network_in_bits_task_by_task():
    # On one bit every sample of a task is one of two, so that the loss can be worked out in full.
    tasks = parity_tasks(1, 1, size=1)
    network = ParityNetwork(1, 1, 8, generator=generator(), dtype=torch.float64)
    run = train_parity(network, tasks, steps=20, batch=8, lr=0.1, held_out=400)
    samples = parity_samples(tasks, torch.zeros(400, dtype=torch.int64), generator(), dtype=torch.float64)
    chance = network(samples.task, samples.bits).softmax(1)[torch.arange(400), samples.label]
    assert run.losses[-1].item() == pytest.approx(-chance.log2().mean().item(), rel=1e-12)


def test_the_mean_loss_is_that_of_samples_drawn_by_the_shares():
    tasks, network, run = trained(steps=120, held_out=4096)
    samples = parity_samples(tasks, 100_000, generator(1))
    losses = nn.functional.cross_entropy(network(samples.task, samples.bits), samples.label, reduction="none")
    losses = losses.detach() / math.log(2)
    error = losses.std().item() / math.sqrt(4096)
    assert 0.05 < losses.mean() < 0.95
    assert run.mean_loss[-1].item() == pytest.approx(losses.mean().item(), abs=4 * error)
    assert run.mean_loss.tolist() == pytest.approx([math.fsum(row) for row in (run.losses * tasks.shares).tolist()])


def test_training_is_adam_on_the_stream_that_the_seed_gives():
    tasks, network, _ = trained(steps=3, dtype=torch.float64, held_out=2)
    plain = ParityNetwork(4, 8, 32, generator=generator(), dtype=torch.float64)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2, foreach=False)
    source = generator()
    parity_samples(tasks, torch.arange(4).repeat_interleave(2), source)  # the held-out samples come first
    for _ in range(3):
        samples = parity_samples(tasks, 64, source, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(samples.task, samples.bits), samples.label).backward()
        optimizer.step()
    for ours, theirs in zip(network.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_seed_gives_the_same_run_and_another_seed_another(dtype):
    first, again, other = (trained(steps=20, seed=seed, dtype=dtype)[2].losses for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float64


def test_the_loss_is_taken_at_the_start_at_the_end_and_evenly_in_the_logarithm():
    _, _, run = trained(steps=200, points=20)
    assert run.steps[:2].tolist() == [0, 1]
    assert run.steps[-1] == 200
    assert len(run.losses) == len(run.steps)
    late = run.steps[run.steps >= 20].log()
    assert late.diff().tolist() == pytest.approx([math.log(200) / 19] * (len(late) - 1), abs=0.05)


def test_a_task_is_learned_at_the_first_step_below_the_threshold_or_never():
    losses = torch.tensor([[1.0, 1.0, 0.0], [0.2, 1.0, 0.0], [0.05, 0.1, 0.0], [0.2, 0.1, 0.0]])
    run = ParityRun(torch.tensor([0, 1, 5, 9]), losses, torch.full((3,), 1 / 3))
    assert run.learned_at().tolist() == [5.0, math.inf, 0.0]
    assert run.learned_at(0.3).tolist() == [1.0, 5.0, 0.0]


def test_single_bits_are_learned_before_pairs():
    _, _, one = trained(steps=100)
    tasks = parity_tasks(4, 8, size=2)
    two = train_parity(ParityNetwork(4, 8, 32, generator=generator()), tasks, steps=100, batch=64, lr=1e-2)
    assert one.mean_loss[-1] < 0.5 * two.mean_loss[-1]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: parity_tasks(0, 8), "tasks must be an integer from 1 to 56, got 0"),
        (lambda: parity_tasks(57, 8), "tasks must be an integer from 1 to 56, got 57"),
        (lambda: parity_tasks(1, 2), "size must be an integer from 1 to 2, got 3"),
        (lambda: parity_tasks(1, 8, g=0.0), "g must be"),
        (lambda: parity_samples(parity_tasks(1, 8), 0, generator()), "which"),
        (lambda: ParityNetwork(3, 4, 0), "width"),
        (lambda: trained(steps=0), "steps"),
        (lambda: trained(batch=0), "batch"),
        (lambda: trained(points=0), "points"),
        (lambda: trained(held_out=0), "held_out"),
        (lambda: trained(lr=0.0), "lr"),
        (lambda: trained()[2].learned_at(0.0), "threshold"),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
