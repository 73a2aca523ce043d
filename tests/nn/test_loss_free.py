"""Loss-free balancing: the steps of the biases, and that they balance."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from danlu.nn import LossFreeConfig
from danlu.nn.balance import Balancer, max_violation, update
from danlu.nn.loss_free import bias_step


@pytest.mark.parametrize("rule", ["sign", "rms"])
def test_biases_keep_zero_mean_and_move_against_the_load(rule: str) -> None:
    counts = torch.tensor([[9.0, 0, 3, 4], [5, 5, 5, 5]])
    step = bias_step(counts, LossFreeConfig(rate=0.1, rule=rule))  # type: ignore[arg-type]
    assert step.mean(-1).abs().max() < 1e-8
    assert step[0].argmin() == 0
    assert step[0].argmax() == 1
    assert not step[1].any()


def test_rms_step_is_the_centred_excess_over_its_root_mean_square() -> None:
    counts = torch.tensor([8.0, 1, 2, 5])
    excess = counts / 16 - 0.25
    expected = -0.01 * excess / excess.square().mean().sqrt()
    torch.testing.assert_close(bias_step(counts, LossFreeConfig(rate=0.01, rule="rms")), expected)


def test_nothing_counted_moves_nothing() -> None:
    for rule in ("sign", "rms"):
        assert not bias_step(torch.zeros(5), LossFreeConfig(rule=rule)).any()  # type: ignore[arg-type]


def test_relative_step_is_the_excess_over_the_mean_and_centring_takes_the_mean_off() -> None:
    counts = torch.tensor([8.0, 1, 2, 5])
    step = bias_step(counts, LossFreeConfig(rate=0.01, rule="relative"))
    torch.testing.assert_close(step, -0.01 * (counts / 4 - 1))
    drifting = bias_step(counts, LossFreeConfig(rate=0.01, centered=False))
    torch.testing.assert_close(drifting, torch.tensor([-0.01, 0.01, 0.01, -0.01]))
    lopsided = torch.tensor([9.0, 1, 1, 1])
    free, centred = (bias_step(lopsided, LossFreeConfig(rate=0.01, centered=c)) for c in (False, True))
    assert free.mean() != 0
    torch.testing.assert_close(free - free.mean(), centred)


def simulate(config: LossFreeConfig, steps: int) -> list[float]:
    """Batch MaxVio of 64 experts, 6 chosen, with a fixed offset per expert."""
    g = torch.Generator().manual_seed(0)
    offset = torch.randn(64, generator=g)
    balancer, history = Balancer(64, config), []
    for _ in range(steps):
        scores = (torch.randn(1024, 64, generator=g) + offset).sigmoid()
        counts = (scores + balancer.bias).topk(6, -1).indices.flatten().bincount(minlength=64)
        history.append(max_violation(counts).item())
        balancer.count(counts, 1024)
        update(balancer)
    return history


def test_balancing_reaches_the_sampling_floor_and_rms_gets_there_faster() -> None:
    sign, rms, none = (
        simulate(LossFreeConfig(rate=rate, rule=rule), 600)  # type: ignore[arg-type]
        for rate, rule in [(1e-3, "sign"), (1e-3, "rms"), (0.0, "sign")]
    )
    # 1024 tokens make 96 choices an expert: the largest of 64 counts lies about 2.4 / sqrt(96) above the mean.
    floor = 2.4 / 96**0.5
    assert sum(none[-50:]) / 50 > 4
    assert sum(sign[-50:]) / 50 < 1.2 * floor
    assert sum(rms[-50:]) / 50 < 1.2 * floor
    assert rms[100] < sign[100] / 2


def test_a_tenth_of_the_rate_is_slower_and_ten_times_the_rate_ends_less_even() -> None:
    histories = {rate: simulate(LossFreeConfig(rate=rate), 400) for rate in (1e-4, 1e-3, 1e-2)}
    assert histories[1e-4][-1] > 5 * histories[1e-3][-1]
    last = {rate: sum(history[-50:]) / 50 for rate, history in histories.items()}
    assert last[1e-2] > 1.2 * last[1e-3]


@pytest.mark.parametrize("n", [5, 10])
def test_the_same_rule_solves_the_assignment_problem(n: int) -> None:
    """Rows choose the column of least cost plus bias; once all choices differ, they are the cheapest assignment."""
    generator = torch.Generator().manual_seed(n)
    for _ in range(3):
        costs = torch.rand(n, n, generator=generator)
        bias, rate = torch.zeros(n), 0.05  # added to minus the cost: the form with argmax, where an over-used one falls
        for _ in range(5000):
            chosen = (bias - costs).argmax(-1)
            counts = torch.bincount(chosen, minlength=n)
            if counts.max() == 1:
                break
            bias += bias_step(counts, LossFreeConfig(rate=rate))
            rate *= 0.999
        best = costs.numpy()[linear_sum_assignment(costs.numpy())].sum()
        assert costs[torch.arange(n), chosen].sum().item() == pytest.approx(best, rel=1e-6)
