"""Fine-grained and shared experts: the factor that balances their norms, and the identities behind the layer."""

from functools import partial
from typing import cast

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_most, exact
from danlu.nn.dynamic_experts import DynamicConfig
from danlu.nn.feed_forward import FeedForward
from danlu.nn.moe import MoE, MoEConfig, scaling_factor


def _ratio_of_rms(experts: int, active: int, shared: int) -> float:
    """The wrong average: root mean squares of both parts, divided; softmax scores, not renormalised."""
    logits = torch.randn(20_000, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = logits.softmax(-1).topk(active, dim=-1).values
    return float((shared / chosen.square().sum(-1).mean()).sqrt())


@torch.no_grad()
def _equal_experts_error(*, renormalize: bool) -> float:
    """Distance of a layer whose experts are all alike from ``(shared + scale) * expert(x)``, relative."""
    generator = torch.Generator().manual_seed(0)
    config = MoEConfig(num_experts=7, top_k=3, hidden=11, num_shared_experts=1, scale=2.5, renormalize=renormalize)
    layer = MoE(13, config).double().eval()
    shared = cast(FeedForward, layer.shared)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    layer.w_up.copy_(shared.gate_up.weight.expand_as(layer.w_up))
    layer.w_down.copy_(shared.down.weight.expand_as(layer.w_down))
    x = torch.randn(17, 13, generator=generator, dtype=torch.float64)
    expected = (1 + 2.5) * shared(x)
    return float((layer(x) - expected).abs().max() / expected.abs().max())


def _by_hand(layer: MoE, x: Tensor, *, best: int = 2) -> Tensor:
    """The layer's formula with every expert on every token; groups are ranked by the sum of their ``best`` scores."""
    c = layer.config
    logits = x @ layer.router.mT
    scores = {"sigmoid": logits.sigmoid(), "softmax": logits.softmax(-1), "relu": logits.relu()}[c.gate]
    biased = (scores if c.select_by == "gate" else logits.sigmoid()).detach() + layer.balancer.bias
    if c.balance.thresholds:
        chosen = biased > 0
    else:
        rank = biased.unflatten(-1, (c.num_groups, -1)).topk(best, -1).values.sum(-1)
        outside = torch.ones_like(rank).scatter(-1, rank.topk(c.top_k_groups, -1).indices, 0.0)
        outside = outside.repeat_interleave(c.num_experts // c.num_groups, -1)
        biased = torch.where(outside > 0, -torch.inf, biased)
        chosen = torch.zeros_like(scores).scatter(-1, biased.topk(c.top_k, -1).indices, 1.0) > 0
    gate = torch.where(chosen, scores, 0.0)
    gate = layer.scale * (gate / gate.sum(-1, keepdim=True) if c.renormalize else gate)
    first, second = torch.einsum("nd,ehd->neh", x, layer.w_up).chunk(2, -1)
    each = torch.einsum("neh,edh->ned", first * first.sigmoid() * second, layer.w_down)
    if c.normalize_experts:
        each = each / (each.square().mean(-1, keepdim=True) + 1e-12).sqrt() * layer.out_std * c.hidden**0.5
    y = (gate[..., None] * each).sum(1)
    if layer.shared is not None:
        first, second = (x @ layer.shared.gate_up.weight.mT).chunk(2, -1)
        y = y + first * first.sigmoid() * second @ layer.shared.down.weight.mT
    return y


def _formula_error(*, best: int = 2) -> float:
    """Largest relative error of outputs and gradients of five layers, and of one token's output, in float64."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for changes in (
        {"num_shared_experts": 2},
        {"num_groups": 4, "top_k_groups": 2},
        {"gate": "softmax", "select_by": "sigmoid", "renormalize": False},
        {"gate": "relu", "renormalize": False, "normalize_experts": True},
        {"balance": DynamicConfig()},
    ):
        options = {"num_experts": 12, "top_k": 3, "hidden": 5, "num_shared_experts": 0, "scale": 1.7} | changes
        layer = MoE(11, MoEConfig(**options)).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
            layer.balancer.bias.add_(0.1 * torch.randn(12, generator=generator))
        x = torch.randn(40, 11, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(40, 11, generator=generator, dtype=torch.float64)
        wanted, found = _by_hand(layer, x, best=best), layer(x)
        inputs = [x, *layer.parameters()]
        pairs = [(found, wanted), *zip(*(torch.autograd.grad((weight * y).sum(), inputs) for y in (found, wanted)))]
        with torch.no_grad():
            pairs.append((layer(x[:1]), wanted[:1]))
        layer.eval()
        pairs.append(
            tuple(torch.func.jvp(f, (x.detach(),), (weight,))[1] for f in (layer, partial(_by_hand, layer, best=best)))
        )
        worst = max(worst, *(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs))
    return worst


def _sizes(experts: int, active: int, hidden: int) -> tuple[int, int]:
    """Weights of the routed experts of a layer: all, and those one token meets."""
    with torch.device("meta"):
        layer = MoE(32, MoEConfig(num_experts=experts, top_k=active, hidden=hidden, num_shared_experts=0, scale=1.0))
    total = layer.w_up.numel() + layer.w_down.numel()
    return total, total * active // experts


def _split_difference(active: int) -> float:
    """Weights that appear or vanish when 8 experts of 64, 2 a token, are split four times finer."""
    coarse, fine = _sizes(8, 2, 64), _sizes(32, active, 16)
    return float(abs(coarse[0] - fine[0]) + abs(coarse[1] - fine[1]))


CLAIMS = (
    Claim(
        name="factor-deepseek-v2",
        statement="factor on 160 routed experts, 6 a token, 2 shared, plain softmax; control: ratio of mean squares",
        source="kexue.fm 10945; DeepSeek-V2's configuration (16.0)",
        expected=16.0,
        tolerance=absolute(0.04),
        measure=lambda: scaling_factor(160, 6, 2, "softmax", renormalize=False),
        control=lambda: _ratio_of_rms(160, 6, 2),
        seconds=0.4,
    ),
    Claim(
        name="factor-deepseek-v3",
        statement="factor on 256 routed experts, 8 a token, 1 shared, renormalised sigmoid; control: softmax",
        source="kexue.fm 10945 (2.83; DeepSeek-V3 itself uses 2.5)",
        expected=2.83,
        tolerance=absolute(0.005),
        measure=lambda: scaling_factor(256, 8, 1),
        control=lambda: scaling_factor(256, 8, 1, "softmax"),
        seconds=0.6,
    ),
    Claim(
        name="factor-moonlight",
        statement="factor on 64 routed experts, 6 a token, renormalised sigmoid, numerator 1; control: two shared",
        source="Moonlight, arXiv 2502.16982, appendix C (2.446)",
        expected=2.446,
        tolerance=absolute(0.0005),
        measure=lambda: scaling_factor(64, 6, 0),
        control=lambda: scaling_factor(64, 6, 2),
        seconds=0.2,
    ),
    Claim(
        name="factor-moonlight-corrected",
        statement="the same with Moonlight's two shared experts counted; control: numerator 1",
        source="kexue.fm 10945, author's comment of June 2025 (3.4595)",
        expected=3.4595,
        tolerance=absolute(0.0005),
        measure=lambda: scaling_factor(64, 6, 2),
        control=lambda: scaling_factor(64, 6, 0),
        seconds=0.2,
    ),
    Claim(
        name="written-out",
        statement="error of five layers and their gradients against the formulas; control: groups by one score",
        source="DeepSeek-V2, arXiv 2405.04434, V3, 2412.19437 (groups by their two best), kexue.fm 10699, 10815",
        expected=1e-14,
        tolerance=at_most(),
        measure=_formula_error,
        control=lambda: _formula_error(best=1),
        seconds=0.4,
    ),
    Claim(
        name="equal-experts",
        statement="relative error against (1 + factor) times one expert when all are alike; control: not renormalised",
        source="derivation: renormalised gates sum to the factor",
        expected=1e-15,
        tolerance=at_most(),
        measure=lambda: _equal_experts_error(renormalize=True),
        control=lambda: _equal_experts_error(renormalize=False),
        seconds=0.1,
    ),
    Claim(
        name="finer-experts-cost-the-same",
        statement="change of total plus active weights when experts are split in four; control: two a token still",
        source="DeepSeekMoE, arXiv 2401.06066, section 3.1",
        expected=0,
        tolerance=exact(),
        measure=lambda: _split_difference(8),
        control=lambda: _split_difference(2),
        seconds=0.1,
    ),
)
