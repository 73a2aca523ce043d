"""Fine-grained and shared experts: the factor that balances their norms, and the identities behind the layer."""

from typing import cast

import torch

from danlu.claims.frame import Claim, absolute, at_most, exact
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


def _sizes(experts: int, active: int, hidden: int) -> tuple[int, int]:
    """Weights of the routed experts of a layer: all, and those one token meets."""
    with torch.device("meta"):
        layer = MoE(32, MoEConfig(num_experts=experts, top_k=active, hidden=hidden, num_shared_experts=0, scale=1.0))
    total = layer.w_up.numel() + layer.w_down.numel()
    return total, total * active // experts


def _split_difference(hidden: int) -> float:
    """Weights that appear or vanish when 8 experts of 64, 2 a token, are split four times finer."""
    coarse, fine = _sizes(8, 2, 64), _sizes(32, 8, hidden)
    return float(abs(coarse[0] - fine[0]) + abs(coarse[1] - fine[1]))


CLAIMS = (
    Claim(
        name="factor-deepseek-v2",
        statement="factor on 160 routed experts, 6 a token, 2 shared, plain softmax; control: ratio of mean squares",
        source="kexue.fm 10945; DeepSeek-V2's configuration (16.0)",
        expected=16.0,
        tolerance=absolute(0.15),
        measure=lambda: scaling_factor(160, 6, 2, "softmax", renormalize=False),
        control=lambda: _ratio_of_rms(160, 6, 2),
        seconds=1.0,
    ),
    Claim(
        name="factor-deepseek-v3",
        statement="factor on 256 routed experts, 8 a token, 1 shared, renormalised sigmoid; control: not renormalised",
        source="kexue.fm 10945 (2.83; DeepSeek-V3 itself uses 2.5)",
        expected=2.83,
        tolerance=absolute(0.005),
        measure=lambda: scaling_factor(256, 8, 1),
        control=lambda: scaling_factor(256, 8, 1, renormalize=False),
        seconds=1.5,
    ),
    Claim(
        name="factor-moonlight",
        statement="factor on 64 routed experts, 6 a token, renormalised sigmoid, numerator 1; control: two shared",
        source="Moonlight, arXiv 2502.16982, appendix C (2.446)",
        expected=2.446,
        tolerance=absolute(0.001),
        measure=lambda: scaling_factor(64, 6, 0),
        control=lambda: scaling_factor(64, 6, 2),
        seconds=0.5,
    ),
    Claim(
        name="factor-moonlight-corrected",
        statement="the same with Moonlight's two shared experts counted; control: numerator 1",
        source="kexue.fm 10945, author's comment of June 2025 (3.4595)",
        expected=3.4595,
        tolerance=absolute(0.001),
        measure=lambda: scaling_factor(64, 6, 2),
        control=lambda: scaling_factor(64, 6, 0),
        seconds=0.5,
    ),
    Claim(
        name="equal-experts",
        statement="relative error against (1 + factor) times one expert when all are alike; control: not renormalised",
        source="derivation: renormalised gates sum to the factor",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _equal_experts_error(renormalize=True),
        control=lambda: _equal_experts_error(renormalize=False),
        seconds=0.2,
    ),
    Claim(
        name="finer-experts-cost-the-same",
        statement="change of total plus active weights when experts are split in four; control: split in three",
        source="DeepSeekMoE, arXiv 2401.06066, section 3.1",
        expected=0,
        tolerance=exact(),
        measure=lambda: _split_difference(16),
        control=lambda: _split_difference(21),
        seconds=0.1,
    ),
)
