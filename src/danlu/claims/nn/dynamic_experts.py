"""A dynamic number of experts: the rules, where the thresholds begin, and the budget and balance they hold."""

from functools import lru_cache

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_most, exact, relative
from danlu.nn import MoE, MoEConfig
from danlu.nn.balance import max_violation
from danlu.nn.dynamic_experts import DynamicConfig, Rule, expected_budget, initial_bias, threshold_step

_EXPERTS, _BUDGET, _TOKENS = 64, 6.0, 2048


def _printed(share_e: Tensor, rule: str, *, mean: bool) -> Tensor:
    """The direction of a rule for the share of the tokens that chose each expert; RMS of the mean, or of the sum."""
    budget, n = share_e.sum(), len(share_e)
    if rule in ("A", "B"):
        even = (share_e / budget - 1 / n).sign()
        excess = budget - _BUDGET
        return even - even.mean() + (excess if rule == "A" else excess.clamp_min(0)).sign()
    excess = share_e - _BUDGET / n
    if rule == "C":
        return excess.sign()
    return excess / (excess.square().mean() if mean else excess.square().sum()).sqrt()


def _rule_error(*, mean: bool) -> float:
    """Largest distance of the steps of all four rules from the printed ones, above and below the budget."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for rule in ("A", "B", "C", "D"):
        for top in (500, 300):
            counts = torch.randint(top, (_EXPERTS,), generator=generator)
            config = DynamicConfig(rule=rule, rate=1.0)
            step = threshold_step(counts, _TOKENS, _BUDGET, config)
            worst = max(worst, float((step + _printed(counts.double() / _TOKENS, rule, mean=mean)).abs().max()))
    return worst


@lru_cache(maxsize=8)
def _simulate(rule: Rule, rate: float = 1e-3, first: float = 1.1) -> tuple[float, float]:
    """Mean budget and MaxVio of the last 100 of 300 batches with Gaussian logits; the first budget is ``first`` k."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(16, _TOKENS, _EXPERTS, generator=generator).sigmoid_()
    config = DynamicConfig(rule=rule, rate=rate)
    bias = torch.full((_EXPERTS,), initial_bias(_EXPERTS, first * _BUDGET))
    budgets, violations = [], []
    for step in range(300):
        counts = (pool[step % 16] + bias > 0).sum(0).float()
        budgets.append(float(counts.sum()) / _TOKENS)
        violations.append(float(max_violation(counts)))
        bias = bias + threshold_step(counts, _TOKENS, _BUDGET, config)
    return sum(budgets[-100:]) / 100, sum(violations[-100:]) / 100


@torch.no_grad()
def _spread(fixed: int) -> float:
    """Standard deviation over 30 000 tokens of how many experts a layer gives them.

    The control gives every token its ``fixed`` best and decides over the others only.
    """
    generator = torch.Generator().manual_seed(0)
    config = MoEConfig(num_experts=_EXPERTS, top_k=6, hidden=2, scale=1.0, balance=DynamicConfig())
    layer = MoE(256, config).eval()
    # Orthogonal rows of length one: independent logits of variance one.
    layer.router.copy_(torch.linalg.qr(torch.randn(256, _EXPERTS, generator=generator)).Q.T)
    x = torch.randn(30_000, 256, generator=generator)
    chosen = layer.route(x)[1]
    if fixed:
        scores = (x @ layer.router.mT).sigmoid()
        chosen = scores > -initial_bias(_EXPERTS - fixed, 6 - fixed)
        chosen = chosen.scatter(-1, scores.topk(fixed, -1).indices, True)
    return float(chosen.sum(-1).double().std())


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
        name="rules",
        statement="distance of the steps of the four rules from the printed ones; control: RMS from the sum of squares",
        source="kexue.fm 10815, whose text words the RMS as the root of the sum",
        expected=1e-6,
        tolerance=at_most(),
        measure=lambda: _rule_error(mean=True),
        control=lambda: _rule_error(mean=False),
        seconds=0.1,
    ),
    Claim(
        name="initial-bias",
        statement="bias for 4 of 32 experts, router of std 0.006, size 1024, by bisection; control: std 0.0065",
        source="kexue.fm 10815 (-0.5546875 after seven halvings)",
        expected=-0.5546875,
        tolerance=exact(),
        measure=lambda: _bisection(6e-3),
        control=lambda: _bisection(6.5e-3),
        seconds=0.1,
    ),
    Claim(
        name="initial-bias-in-closed-form",
        statement="the same by the quantile of the normal distribution; control: that of k / n, not of 1 - k / n",
        source="derivation: -sigmoid(sigma sqrt(d) Phi^-1(1 - k / n))",
        expected=-0.55499,
        tolerance=absolute(5e-6),
        measure=lambda: initial_bias(32, 4, std=6e-3 * 1024**0.5),
        control=lambda: initial_bias(32, 28, std=6e-3 * 1024**0.5),
        seconds=0.1,
    ),
    Claim(
        name="budget",
        statement="mean experts per token under rule A, from 5.4, asked for 6 of 64; control: a ceiling of 6 (rule B)",
        source="kexue.fm 10815 (5.995 in a simulation of this setting)",
        expected=6.0,
        tolerance=relative(0.002),
        measure=lambda: _simulate("A", first=0.9)[0],
        control=lambda: _simulate("B", first=0.9)[0],
        seconds=0.6,
    ),
    Claim(
        name="ceiling",
        statement="mean experts per token under rule B with a ceiling of 6, from 6.6; control: rule A",
        source="kexue.fm 10815 (5.78 from above in a simulation; k less the step of the budget)",
        expected=5.87,
        tolerance=relative(0.01),
        measure=lambda: _simulate("B")[0],
        control=lambda: _simulate("A")[0],
        seconds=0.6,
    ),
    Claim(
        name="floor",
        statement="MaxVio of a batch under rule D; control: rule C at a rate four times as high",
        source="noise of 192 choices an expert (2.4 / sqrt(192) = 0.17; 0.18 in a simulation)",
        expected=0.17,
        tolerance=relative(0.08),
        measure=lambda: _simulate("D")[1],
        control=lambda: _simulate("C", 4e-3)[1],
        seconds=0.6,
    ),
    Claim(
        name="tokens-differ",
        statement="standard deviation over tokens of a layer's number of experts; control: three are fixed",
        source="derivation: binomial, sqrt(6 (1 - 6 / 64)); kexue.fm 10815 (2.3 in a simulation)",
        expected=2.332,
        tolerance=relative(0.01),
        measure=lambda: _spread(0),
        control=lambda: _spread(3),
        seconds=0.6,
    ),
)
