"""Expert layer, forward and backward, 2048 tokens, beside transformers' back ends and a dense layer of equal work.

Model size 256, experts of width 128, float32, renormalised sigmoid gates, no shared expert. Every contestant has the
same router and weights; ``dense`` is one SwiGLU layer as wide as the experts that a token uses. Of transformers' back
ends ``batched_mm`` is left out: it copies the weights of every choice (2 GB in the smallest case here).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import harness
from danlu.nn import FeedForward, MoE, MoEConfig

CASES = ((16, 2), (16, 4), (64, 4), (64, 6))
TOKENS, DIM, HIDDEN = 2048, 256, 128


def theirs(ours: MoE, implementation: str) -> nn.Module:
    """transformers' DeepseekV3 layer without its shared expert, with our weights."""
    import transformers
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=DIM,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=ours.config.experts,
        num_experts_per_tok=ours.config.active,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=ours.scale,
    )
    config._experts_implementation = implementation
    layer = DeepseekV3MoE(config)
    layer.shared_experts = _Nothing()
    with torch.no_grad():
        layer.gate.weight.copy_(ours.router)
        layer.experts.gate_up_proj.copy_(ours.w_up)
        layer.experts.down_proj.copy_(ours.w_down)
    return layer


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros((), dtype=x.dtype)


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """One forward and backward pass with fresh gradients."""

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(grad)

    return run


def main() -> None:
    """Run the comparison for every case."""
    options = harness.options(__doc__, cpu_time=True, threads=1)
    tables = []
    for experts, active in CASES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, TOKENS, DIM, generator=generator).requires_grad_()
        grad = torch.randn(1, TOKENS, DIM, generator=generator)
        ours = MoE(DIM, MoEConfig(experts=experts, active=active, hidden=HIDDEN, shared=0))
        layers: dict[str, nn.Module] = {
            "transformers eager": theirs(ours, "eager"),
            "transformers grouped_mm": theirs(ours, "grouped_mm"),
            "dense": FeedForward(DIM, active * HIDDEN),
            "danlu": ours,
        }
        with torch.no_grad():
            difference = (layers["transformers eager"](x) - ours(x)).abs().max().item()
        runs = {name: step(layer, x, grad) for name, layer in layers.items()}
        notes = {"danlu": f"largest difference from eager {difference:.1e}"}
        title = f"{experts} experts, {active} a token"
        tables.append(harness.compare(title, runs, base="transformers eager", options=options, notes=notes))
    harness.write("moe", __doc__, tables, options)


if __name__ == "__main__":
    main()
