"""Dynamic number of experts: rules, initial threshold, and the budget they hold."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from danlu.nn import DynamicConfig, MoE, MoEConfig
from danlu.nn.balance import attach, expert_load, max_violation
from danlu.nn.dynamic_experts import expected_budget, initial_bias, threshold_step

EXPERTS, BUDGET, TOKENS = 64, 6.0, 2048


@lru_cache(maxsize=1)
def batches() -> Tensor:
    """Sigmoid scores of 24 batches, Gaussian logits with an offset for each expert."""
    generator = torch.Generator().manual_seed(0)
    offsets = 0.5 * torch.randn(EXPERTS, generator=generator)
    return (torch.randn(24, TOKENS, EXPERTS, generator=generator) + offsets).sigmoid_()


@lru_cache(maxsize=8)
def simulate(rule: str, start: float, steps: int = 1500) -> tuple[float, float, float, Tensor]:
    """Mean budget and MaxVio of the last 100 batches, spread of the number a token uses, all budgets."""
    config = DynamicConfig(rule=rule)  # type: ignore[arg-type]
    bias, budgets, violations = torch.full((EXPERTS,), start), [], []
    for step in range(steps):
        chosen = batches()[step % 24] + bias > 0
        counts = chosen.sum(0).float()
        budgets.append(counts.sum().item() / TOKENS)
        violations.append(max_violation(counts).item())
        bias = bias + threshold_step(counts, TOKENS, BUDGET, config)
    spread = chosen.sum(-1).float().std().item()
    return sum(budgets[-100:]) / 100, sum(violations[-100:]) / 100, spread, torch.tensor(budgets)


START = initial_bias(EXPERTS, BUDGET, std=1.25**0.5)  # logits and offsets together


@pytest.mark.parametrize("rule", ["A", "C", "D"])
def test_budget_is_held_within_two_percent_and_the_load_at_the_noise_of_a_batch(rule: str) -> None:
    budget, violation, spread, _ = simulate(rule, START)
    assert budget == pytest.approx(BUDGET, rel=0.02)
    # 192 choices an expert: the largest of 64 counts lies about 2.4 / sqrt(192) = 0.17 above the mean.
    assert violation < 1.3 * 2.4 / (TOKENS * BUDGET / EXPERTS) ** 0.5
    assert spread > 1


def test_ceiling_holds_from_above_and_leaves_a_lower_budget_alone() -> None:
    above, violation, _, _ = simulate("B", START + 0.05)
    assert above <= BUDGET * 1.01
    assert violation < 1.3 * 2.4 / (TOKENS * BUDGET / EXPERTS) ** 0.5
    below, _, _, _ = simulate("B", START - 0.15)
    assert below < 0.9 * BUDGET


def test_balance_alone_does_not_control_the_budget() -> None:
    """A translation of the source invents that it does: from zero biases every token keeps every expert."""
    bias = torch.zeros(EXPERTS)
    for step in range(100):
        counts = (batches()[step % 24] + bias > 0).sum(0).float()
        even = torch.sign(counts - counts.mean())
        bias = bias - 1e-3 * (even - even.mean())
    assert (batches()[0] + bias > 0).sum() == TOKENS * EXPERTS


def test_initial_bias_is_the_one_of_the_source() -> None:
    std = 6e-3 * 1024**0.5
    assert initial_bias(32, 4, std=std) == pytest.approx(-0.55499, abs=5e-6)
    low, high, halvings = -1.0, 0.0, 0
    while True:  # the source's bisection, with the expectation in place of its sample
        middle, halvings = (low + high) / 2, halvings + 1
        budget = expected_budget(middle, 32, std=std)
        if abs(budget - 4) < 0.1:
            break
        low, high = (low, middle) if budget > 4 else (middle, high)
    assert (middle, halvings) == (-0.5546875, 7)
    assert budget == pytest.approx(4.04, abs=0.005)


@pytest.mark.parametrize("gate", ["sigmoid", "relu"])
def test_initial_bias_gives_the_budget_it_was_asked_for(gate: str) -> None:
    bias = initial_bias(48, 5, std=0.7, gate=gate)
    assert expected_budget(bias, 48, std=0.7, gate=gate) == pytest.approx(5, rel=1e-9)
    assert expected_budget(0.0, 48, gate="sigmoid") == 48
    assert expected_budget(-1.0, 48, gate="sigmoid") == 0


def test_steps_of_the_four_rules_by_hand() -> None:
    counts = torch.tensor([9.0, 2.0, 4.0])  # of 10 tokens: 1.5 a token

    def step(rule: str, budget: float) -> Tensor:
        return threshold_step(counts, 10, budget, DynamicConfig(rate=1.0, rule=rule))  # type: ignore[arg-type]

    torch.testing.assert_close(step("A", 1.2), -torch.tensor([4 / 3 + 1, -2 / 3 + 1, -2 / 3 + 1]))
    torch.testing.assert_close(step("A", 1.8), -torch.tensor([4 / 3 - 1, -2 / 3 - 1, -2 / 3 - 1]))
    torch.testing.assert_close(step("B", 1.8), -torch.tensor([4 / 3, -2 / 3, -2 / 3]))
    torch.testing.assert_close(step("B", 1.2), step("A", 1.2))
    torch.testing.assert_close(step("C", 1.2), -torch.tensor([1.0, -1.0, 0.0]))
    excess = torch.tensor([5.0, -2.0, 0.0])
    torch.testing.assert_close(step("D", 1.2), -excess / excess.square().mean().sqrt())
    for rule in "ABCD":
        nothing = threshold_step(torch.zeros(3), 0, 1.2, DynamicConfig(rule=rule))  # type: ignore[arg-type]
        assert not nothing.any()


def test_layer_begins_near_its_budget_never_sorts_and_reports_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = MoE(64, MoEConfig(num_experts=32, top_k=4, hidden=8, balance=DynamicConfig(rate=1e-2)))
    monkeypatch.setattr(torch.Tensor, "topk", None)
    monkeypatch.setattr(torch.Tensor, "sort", None)
    monkeypatch.setattr(torch, "argsort", None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach(layer, optimizer)
    layer(torch.randn(500, 64)).sum().backward()
    optimizer.step()
    found = expert_load(layer)["experts_per_token"]
    assert found == pytest.approx(4, rel=0.15)  # 32 rows of the router have norms that vary by a tenth
    start = initial_bias(32, 4)
    assert not torch.equal(layer.balancer.bias, torch.full((32,), start))


def test_a_token_may_use_no_expert() -> None:
    layer = MoE(6, MoEConfig(num_experts=5, top_k=2, hidden=4, num_shared_experts=0, balance=DynamicConfig()))
    layer.balancer.bias.fill_(-2.0)
    x = torch.randn(7, 6, requires_grad=True)
    y = layer(x)
    assert not y.any()
    y.sum().backward()
    assert x.grad is not None
    assert layer.balancer.tokens == 7


@pytest.mark.parametrize(
    ("options", "message"), [({"rule": "E"}, "rule"), ({"rate": -1.0}, "rate"), ({"freeze_after": -1}, "freeze_after")]
)
def test_impossible_options_are_rejected_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget"):
        initial_bias(8, 8)
    with pytest.raises(ValueError, match="gate"):
        initial_bias(8, 2, gate="softmax")
