"""Loss-free balancing: how even the load becomes, how fast, and that it leaves no trace in the gates."""

from functools import lru_cache

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_least, at_most, exact, relative
from danlu.nn.balance import attach, max_violation
from danlu.nn.loss_free import LossFreeConfig, bias_step
from danlu.nn.moe import MoE, MoEConfig

_EXPERTS, _ACTIVE, _TOKENS = 64, 6, 4096


def _choices(bias: Tensor, offsets: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Count the choices of one batch: Gaussian logits with a fixed offset for each expert, sigmoid scores."""
    scores = (torch.randn(tokens, _EXPERTS, generator=generator) + offsets).sigmoid_()
    return torch.bincount((scores + bias).topk(_ACTIVE, dim=-1).indices.flatten(), minlength=_EXPERTS)


@lru_cache(maxsize=8)
def _simulate(rule: str, rate: float, steps: int) -> tuple[tuple[float, ...], Tensor, Tensor]:
    """Balance a skewed router; return MaxVio of each batch, the final biases and the offsets."""
    generator = torch.Generator().manual_seed(0)
    config = LossFreeConfig(rate=rate, rule=rule)  # type: ignore[arg-type]
    offsets = torch.randn(_EXPERTS, generator=generator)
    bias, violations = torch.zeros(_EXPERTS), []
    for _ in range(steps):
        counts = _choices(bias, offsets, _TOKENS, generator)
        violations.append(float(max_violation(counts)))
        bias = bias + bias_step(counts, config)
    return tuple(violations), bias, offsets


def _last(rate: float, steps: int, window: int) -> float:
    """Mean MaxVio of the last ``window`` batches."""
    return sum(_simulate("sign", rate, steps)[0][-window:]) / window


def _frozen(rate: float, steps: int) -> float:
    """MaxVio over 65 536 fresh tokens with the biases held."""
    _, bias, offsets = _simulate("sign", rate, steps)
    return float(max_violation(_choices(bias, offsets, 65_536, torch.Generator().manual_seed(1))))


def _speed(rule: str, rate: float = 1e-3) -> float:
    """MaxVio of the sign rule over that of ``rule``, mean of batches 96 to 100."""
    sign, other = (sum(_simulate(*kind, 100)[0][-5:]) for kind in (("sign", 1e-3), (rule, rate)))
    return sign / other


@torch.no_grad()
def _rule_error(*, mean: bool) -> float:
    """Largest distance of the steps of all rules from the printed ones; RMS of the mean, or of the sum, of squares."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    counts = torch.randint(300, (3, _EXPERTS), generator=generator)
    share = counts.double() / counts.sum(-1, keepdim=True)
    excess = share - 1 / _EXPERTS
    square = excess.square().mean(-1, keepdim=True) if mean else excess.square().sum(-1, keepdim=True)
    printed = {"sign": excess.sign(), "rms": excess / square.sqrt(), "relative": _EXPERTS * share - 1}
    for rule, direction in printed.items():
        for centered in (False, True):
            config = LossFreeConfig(rate=0.1, rule=rule, centered=centered)  # type: ignore[arg-type]
            change = 0.1 * (direction - direction.mean(-1, keepdim=True) * centered)
            worst = max(worst, float((bias_step(counts, config) + change).abs().max()))
    return worst


def _attached(*, first: int) -> float:
    """Largest distance of a layer's biases after two steps of an optimizer from the formula's.

    Each step has two micro-batches, of which those from ``first`` on are counted; the rate halves with the learning
    rate, and padding counts for nothing.
    """
    generator = torch.Generator().manual_seed(0)
    balance = LossFreeConfig(rate=0.1, rule="rms", scheduled=True)
    layer = MoE(6, MoEConfig(num_experts=5, top_k=2, hidden=4, scale=1.0, balance=balance)).double()
    with torch.no_grad():
        layer.router.copy_(torch.randn(5, 6, generator=generator))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach(layer, optimizer)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    bias = torch.zeros(5, dtype=torch.float64)
    for factor in (1.0, 0.5):
        counts = torch.zeros(5, dtype=torch.float64)
        for number in range(2):
            x = torch.randn(2, 70, 6, generator=generator, dtype=torch.float64)
            real = torch.rand(2, 70, generator=generator) < 0.8
            with torch.no_grad():
                chosen = ((x[real] @ layer.router.mT).sigmoid() + bias).topk(2, -1).indices
            if number >= first:
                counts += torch.bincount(chosen.flatten(), minlength=5)
            layer(x, real=real).sum().backward()
        excess = counts / counts.sum() - 1 / 5
        bias = bias - 0.1 * factor * excess / excess.square().mean().sqrt()
        optimizer.param_groups[0]["lr"] = factor
        for parameter in layer.parameters():
            parameter.grad = None
        optimizer.step()
    return float((layer.balancer.bias - bias).abs().max())


@torch.no_grad()
def _trace(*, biased_gate: bool) -> float:
    """Largest difference of gates from the chosen experts' own scores, renormalised, under strong biases."""
    generator = torch.Generator().manual_seed(0)
    layer = MoE(16, MoEConfig(num_experts=12, top_k=3, hidden=4, scale=1.0)).double().eval()
    layer.router.copy_(torch.randn(12, 16, generator=generator, dtype=torch.float64))
    layer.balancer.bias.copy_(torch.randn(12, generator=generator))
    x = torch.randn(31, 16, generator=generator, dtype=torch.float64)
    gate, chosen = layer.route(x)
    scores = (x @ layer.router.mT).sigmoid() + (layer.balancer.bias if biased_gate else 0)
    picked = scores.gather(-1, chosen)
    return float((gate - picked / picked.sum(-1, keepdim=True)).abs().max())


@torch.no_grad()
def _changed_choices(shift: Tensor) -> float:
    """Number of tokens whose set of experts changes when ``shift`` is added to the biases."""
    generator = torch.Generator().manual_seed(0)
    layer = MoE(16, MoEConfig(num_experts=12, top_k=3, hidden=4, scale=1.0)).double().eval()
    layer.router.copy_(torch.randn(12, 16, generator=generator, dtype=torch.float64))
    x = torch.randn(211, 16, generator=generator, dtype=torch.float64)
    _, before = layer.route(x)
    layer.balancer.bias.add_(shift)
    _, after = layer.route(x)
    return float((before.sort(-1).values != after.sort(-1).values).any(-1).sum())


CLAIMS = (
    Claim(
        name="rules",
        statement="distance of three rules' steps from the printed ones; control: RMS from the sum of squares",
        source="kexue.fm 10757; arXiv 2408.15664, equation 5 and section 4",
        expected=1e-6,
        tolerance=at_most(),
        measure=lambda: _rule_error(mean=True),
        control=lambda: _rule_error(mean=False),
        seconds=0.1,
    ),
    Claim(
        name="after-the-optimizer",
        statement="distance of biases after two steps of two micro-batches from the formula; control: one counts",
        source="arXiv 2408.15664, Algorithm 1: the choices of the whole batch",
        expected=2e-7,
        tolerance=at_most(),
        measure=lambda: _attached(first=0),
        control=lambda: _attached(first=1),
        seconds=0.1,
    ),
    Claim(
        name="floor",
        statement="MaxVio of a batch after balancing, 64 experts, 6 a token, 4096 tokens; control: the rate times ten",
        source="expected maximum of an even multinomial (0.123); kexue.fm 10757 for the rule",
        expected=0.123,
        tolerance=relative(0.08),
        measure=lambda: _last(1e-3, 450, 100),
        control=lambda: _last(1e-2, 100, 20),
        seconds=4.2,
    ),
    Claim(
        name="frozen",
        statement="MaxVio of 65 536 tokens with the found biases held; control: the rate ten times too high",
        source="loss-free balancing, arXiv 2408.15664 (0.04 over 71 M tokens; 0.25 at rate 0.01)",
        expected=0.1,
        tolerance=at_most(),
        measure=lambda: _frozen(1e-3, 450),
        control=lambda: _frozen(1e-2, 100),
        seconds=4.2,
    ),
    Claim(
        name="rms-is-faster",
        statement="times more uneven the sign rule still is after 100 steps; control: RMS from the sum of squares",
        source="kexue.fm 10757 (RMS-normalised update); 14 in a simulation of this setting",
        expected=12.0,
        tolerance=at_least(),
        measure=lambda: _speed("rms"),
        control=lambda: _speed("rms", 1e-3 / _EXPERTS**0.5),
        seconds=3.0,
    ),
    Claim(
        name="no-trace-in-the-gates",
        statement="largest difference of the gates from renormalised scores under biases; control: biased scores",
        source="loss-free balancing, arXiv 2408.15664, equation 3",
        expected=1e-15,
        tolerance=at_most(),
        measure=lambda: _trace(biased_gate=False),
        control=lambda: _trace(biased_gate=True),
        seconds=0.1,
    ),
    Claim(
        name="a-constant-changes-nothing",
        statement="tokens routed otherwise when 0.5 is added to all biases; control: to one bias",
        source="derivation: top-k depends on differences only",
        expected=0,
        tolerance=exact(),
        measure=lambda: _changed_choices(torch.full((12,), 0.5)),
        control=lambda: _changed_choices(0.5 * torch.eye(12)[0]),
        seconds=0.1,
    ),
)
