"""Expert layer, forward and backward, 2048 tokens, beside transformers' back ends and a dense layer of equal work.

Model size 256, experts of width 128, renormalised sigmoid gates, no shared expert. Every implementation has the same
router and weights, in float32 and then in bfloat16; ``danlu, float32 weights`` takes bfloat16 tokens as the recipes do,
and gives float32 gradients. ``dense`` is one SwiGLU layer as wide as the experts that a token uses. Of transformers'
back ends ``batched_mm`` is left out: it copies the weights of every choice (2 GB in the smallest case here).

Parts: ``float32``, ``bfloat16``.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import harness
from danlu.nn import FeedForward, MoE, MoEConfig

CASES = ((16, 2), (16, 4), (64, 4), (64, 6))
PARTS = ("float32", "bfloat16")
TOKENS, DIM, HIDDEN = 2048, 256, 128


def theirs(ours: MoE, implementation: str) -> nn.Module:
    """transformers' DeepseekV3 layer without its shared expert, with our weights."""
    import transformers
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=DIM,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=ours.config.num_experts,
        num_experts_per_tok=ours.config.top_k,
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


def implementations(experts: int, active: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Layers of equal weights."""
    ours = MoE(DIM, MoEConfig(num_experts=experts, top_k=active, hidden=HIDDEN, num_shared_experts=0))
    layers: dict[str, nn.Module] = {
        "transformers eager": theirs(ours, "eager"),
        "transformers grouped_mm": theirs(ours, "grouped_mm"),
        "dense": FeedForward(DIM, active * HIDDEN),
        "danlu": copy.deepcopy(ours),
    }
    layers = {name: layer.to(dtype) for name, layer in layers.items()}
    return layers if dtype == torch.float32 else layers | {"danlu, float32 weights": ours}


def main() -> None:
    """Run the comparison for every case."""
    options = harness.options(__doc__, parts=PARTS, cpu_time=True, threads=1)
    tables = []
    for part in options.parts:
        dtype = getattr(torch, part)
        for experts, active in CASES:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(1, TOKENS, DIM, generator=generator).to(dtype).requires_grad_()
            grad = torch.randn(1, TOKENS, DIM, generator=generator).to(dtype)
            layers = implementations(experts, active, dtype)
            with torch.no_grad():
                outputs = {name: layers[name](x) for name in layers if name != "dense"}
            exact = outputs["transformers eager"]
            notes = {name: f"largest difference {float((y - exact).abs().max()):.1e}" for name, y in outputs.items()}
            runs = {name: step(layer, x, grad) for name, layer in layers.items()}
            title = f"{part}, {experts} experts, {active} a token"
            tables.append(harness.compare(title, runs, base="dense", options=options, notes=notes))
    harness.write("moe", __doc__, tables, options)


if __name__ == "__main__":
    main()
