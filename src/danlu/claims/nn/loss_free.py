"""Loss-free balancing: how even the load becomes, how fast, and that it leaves no trace in the gates."""

from functools import lru_cache

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_least, at_most, exact, relative
from danlu.nn.balance import max_violation
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


def _speed(rule: str) -> float:
    """MaxVio of the sign rule over that of ``rule``, mean of batches 96 to 100."""
    sign, other = (sum(_simulate(name, 1e-3, 100)[0][-5:]) for name in ("sign", rule))
    return sign / other


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
        name="floor",
        statement="MaxVio of a batch after balancing, 64 experts, 6 a token, 4096 tokens; control: biases held at 0",
        source="expected maximum of an even multinomial (0.123); kexue.fm 10757 for the rule",
        expected=0.123,
        tolerance=relative(0.1),
        measure=lambda: _last(1e-3, 450, 100),
        control=lambda: _last(0.0, 20, 10),
        seconds=4.0,
    ),
    Claim(
        name="frozen",
        statement="MaxVio of 65 536 tokens with the found biases held; control: the rate ten times too high",
        source="loss-free balancing, arXiv 2408.15664 (0.04 over 71 M tokens; 0.25 at rate 0.01)",
        expected=0.1,
        tolerance=at_most(),
        measure=lambda: _frozen(1e-3, 450),
        control=lambda: _frozen(1e-2, 100),
        seconds=4.0,
    ),
    Claim(
        name="rms-is-faster",
        statement="how many times more uneven the sign rule still is after 100 steps; control: against itself",
        source="kexue.fm 10757 (RMS-normalised update); 2.56 / 0.39 in a simulation of this setting",
        expected=3.0,
        tolerance=at_least(),
        measure=lambda: _speed("rms"),
        control=lambda: _speed("sign"),
        seconds=1.5,
    ),
    Claim(
        name="no-trace-in-the-gates",
        statement="largest difference of the gates from renormalised scores under biases; control: biased scores",
        source="loss-free balancing, arXiv 2408.15664, equation 3",
        expected=1e-14,
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
