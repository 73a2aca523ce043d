"""A dynamic number of experts: where the thresholds begin, and the budget and balance they hold."""

from functools import lru_cache

import torch

from danlu.claims.frame import Claim, absolute, at_least, at_most, relative
from danlu.nn.balance import max_violation
from danlu.nn.dynamic_experts import DynamicConfig, expected_budget, initial_bias, threshold_step

_EXPERTS, _BUDGET, _TOKENS = 64, 6.0, 2048


@lru_cache(maxsize=8)
def _simulate(rule: str, rate: float = 1e-3) -> tuple[float, float, float]:
    """Mean budget and MaxVio of the last 100 of 600 batches with Gaussian logits; spread of the number a token uses."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(16, _TOKENS, _EXPERTS, generator=generator).sigmoid_()
    config = DynamicConfig(rule=rule, rate=rate)  # type: ignore[arg-type]
    # A tenth too generous, so that the budget has to be brought down.
    bias = torch.full((_EXPERTS,), initial_bias(_EXPERTS, 1.1 * _BUDGET))
    budgets, violations, chosen = [], [], pool[0]
    for step in range(600):
        chosen = pool[step % 16] + bias > 0
        counts = chosen.sum(0).float()
        budgets.append(float(counts.sum()) / _TOKENS)
        violations.append(float(max_violation(counts)))
        bias = bias + threshold_step(counts, _TOKENS, _BUDGET, config)
    return sum(budgets[-100:]) / 100, sum(violations[-100:]) / 100, float(chosen.sum(-1).float().std())


def _bisection(sigma: float) -> float:
    """The source's search for the first bias within 0.1 of a budget of 4 of 32, with the expectation for its sample."""
    low, high = -1.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        budget = expected_budget(middle, 32, std=sigma * 1024**0.5)
        if abs(budget - 4) < 0.1:
            break
        low, high = (low, middle) if budget > 4 else (middle, high)
    return middle


CLAIMS = (
    Claim(
        name="initial-bias",
        statement="bias for 4 of 32 experts, router of std 0.006, size 1024, by bisection; control: std 0.02",
        source="kexue.fm 10815 (-0.5546875 after seven halvings)",
        expected=-0.5546875,
        tolerance=absolute(0),
        measure=lambda: _bisection(6e-3),
        control=lambda: _bisection(0.02),
        seconds=0.1,
    ),
    Claim(
        name="budget",
        statement="mean experts per token under rule A, asked for 6 of 64; control: biases held",
        source="kexue.fm 10815 (5.995 in a simulation of this setting)",
        expected=6.0,
        tolerance=relative(0.02),
        measure=lambda: _simulate("A")[0],
        control=lambda: _simulate("A", 0.0)[0],
        seconds=1.5,
    ),
    Claim(
        name="ceiling",
        statement="mean experts per token under rule B with a ceiling of 6; control: biases held",
        source="kexue.fm 10815 (5.78 from above in a simulation)",
        expected=6.06,
        tolerance=at_most(),
        measure=lambda: _simulate("B")[0],
        control=lambda: _simulate("B", 0.0)[0],
        seconds=1.5,
    ),
    Claim(
        name="floor",
        statement="MaxVio of a batch under rule D; control: rule C at a rate thirty times too high",
        source="noise of 192 choices an expert (2.4 / sqrt(192) = 0.17; 0.18 in a simulation)",
        expected=0.2,
        tolerance=at_most(),
        measure=lambda: _simulate("D")[1],
        control=lambda: _simulate("C", 0.03)[1],
        seconds=1.5,
    ),
    Claim(
        name="tokens-differ",
        statement="standard deviation over tokens of the number of experts; control: top-6",
        source="kexue.fm 10815 (2.3 in a simulation)",
        expected=1.0,
        tolerance=at_least(),
        measure=lambda: _simulate("A")[2],
        control=lambda: float(torch.full((_TOKENS,), _BUDGET).std()),
        seconds=0.1,
    ),
)
