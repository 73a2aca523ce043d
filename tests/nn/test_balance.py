"""Loss-free balancing: the update, when it happens, and that it balances."""

import pytest
import torch

from danlu.nn import LossFreeConfig, MoE, MoEConfig
from danlu.nn.balance import Balancer, attach, bias_step, expert_load, max_violation, update


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


def test_biases_move_after_the_parameters_and_count_every_micro_batch() -> None:
    torch.manual_seed(0)
    layer = MoE(8, MoEConfig(experts=5, active=2, hidden=4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(layer, optimizer)
    for _ in range(3):
        layer(torch.randn(7, 8)).sum().backward()
    assert not layer.balancer.bias.any()
    assert layer.balancer.counts.sum() == 3 * 7 * 2
    optimizer.step()
    assert layer.balancer.bias.any()
    assert layer.balancer.counts.sum() == 0
    assert layer.balancer.load.sum() == 3 * 7 * 2
    assert set(expert_load(layer)) == {"max_vio", "idle_experts"}


def test_a_rate_of_zero_freezes_the_biases() -> None:
    layer = MoE(8, MoEConfig(experts=5, active=2, hidden=4, balance=LossFreeConfig(rate=0)))
    layer(torch.randn(7, 8))
    update(layer)
    assert not layer.balancer.bias.any()


def test_what_the_next_update_needs_is_saved_with_the_model() -> None:
    state = MoE(8, MoEConfig(experts=5, active=2, hidden=4)).state_dict()
    assert {"balancer.bias", "balancer.counts"} <= set(state)
    assert "balancer.load" not in state


def test_a_dense_model_has_no_balance_to_report() -> None:
    model = torch.nn.Linear(3, 3)
    update(model)
    assert expert_load(model) == {}


def simulate(config: LossFreeConfig, steps: int) -> list[float]:
    """Batch MaxVio of 64 experts, 6 chosen, with a fixed offset per expert (spec 003, section 7.5)."""
    g = torch.Generator().manual_seed(0)
    offset = torch.randn(64, generator=g)
    balancer, history = Balancer(64, config), []
    for _ in range(steps):
        scores = (torch.randn(1024, 64, generator=g) + offset).sigmoid()
        counts = (scores + balancer.bias).topk(6, -1).indices.flatten().bincount(minlength=64)
        history.append(max_violation(counts).item())
        balancer.count(counts)
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
