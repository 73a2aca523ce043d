"""LoRA+: the ratio of the rates and what keeps it, ratio 1, the balance of the gradients, adapters on embeddings."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from danlu.claims.frame import Claim, absolute, exact, relative
from danlu.nn import LoRAConfig, apply_lora
from danlu.optim import Cosine, loraplus_groups, schedule


def _adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    return apply_lora(model, LoRAConfig(rank=2, exclude=())).double()


def _ratio_at_the_end(*, multiplied: bool) -> float:
    """Rate of B over that of A after 100 steps of a cosine to a tenth of A's rate."""
    optimizer = AdamW(loraplus_groups(_adapted(), 1e-3))
    scheduler: LRScheduler = (
        schedule(optimizer, Cosine(warmup=0, floor=0.1), 100)
        if multiplied
        else CosineAnnealingLR(optimizer, 100, eta_min=1e-4)
    )
    for _ in range(100):
        optimizer.step()
        scheduler.step()
    rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
    return float(rates["lora_B"] / rates["lora_A"])


def _trained(model: nn.Module, groups: Any) -> Tensor:
    optimizer = AdamW(groups, lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        tokens = torch.randint(13, (16,), generator=generator)
        optimizer.zero_grad()
        model(tokens).sub(1).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def _difference_to_adamw(ratio: float) -> float:
    first = _adapted()
    second = copy.deepcopy(first)
    groups = loraplus_groups(first, 1e-2, ratio, embedding_lr=1e-2, weight_decay=0.1)
    plain = [p for p in second.parameters() if p.requires_grad]
    return float((_trained(first, groups) - _trained(second, plain)).abs().max())


def _norm_ratio(n: int, m: int, rank: int, *, variance_of_b: float, seeds: int = 3) -> float:
    """Geometric mean over seeds of the 1-norm of A's gradient over that of B's, all activations of size one."""
    logs = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator)

        A, B = normal(rank, n) * n**-0.5, normal(m, rank) * variance_of_b**0.5
        x_bn, dy_bm = normal(32, n), normal(32, m)
        grad_A, grad_B = (dy_bm @ B).mT @ x_bn, dy_bm.mT @ (x_bn @ A.mT)
        logs.append(math.log(grad_A.abs().sum() / grad_B.abs().sum()))
    return math.exp(sum(logs) / seeds)


def _slope(*, natural: bool) -> float:
    """Log-log slope of that ratio in the width, from 256 to 4096 at rank 8."""
    narrow, wide = (_norm_ratio(n, n, 8, variance_of_b=1 / 8 if natural else 1 / n, seeds=2) for n in (256, 4096))
    return math.log(wide / narrow) / math.log(16)


def _embedding_factors(*, by_substring: bool) -> float:
    """Tensors that end up with the embeddings' own rate; a substring of the module's type finds none."""
    model = _adapted()
    if by_substring:
        named = model.named_parameters()
        return float(sum(isinstance(p, nn.Embedding) for name, p in named if "lora" in name))
    groups = {group["role"]: group for group in loraplus_groups(model, 1e-3)}
    return float(len(groups["embedding"]["params"]))


CLAIMS = (
    Claim(
        name="ratio-kept",
        statement="rate of B over that of A after a cosine to one tenth; control: a cosine to one absolute rate",
        source="Hayou et al., arXiv 2402.12354: a ratio of 2^4",
        expected=16,
        tolerance=relative(1e-12),
        measure=lambda: _ratio_at_the_end(multiplied=True),
        control=lambda: _ratio_at_the_end(multiplied=False),
        seconds=0.2,
    ),
    Claim(
        name="ratio-one-is-adamw",
        statement="difference to plain AdamW after 20 steps at ratio 1; control: ratio 16",
        source="derivation: nothing else changes",
        expected=0,
        tolerance=exact(),
        measure=lambda: _difference_to_adamw(1.0),
        control=lambda: _difference_to_adamw(16.0),
        seconds=0.3,
    ),
    Claim(
        name="gradient-balance",
        statement="1-norm of A's gradient over that of B's, 4096 to 1024, rank 8; control: B of variance 1/1024",
        source="derivation: (in/out) sqrt(out/rank) = 45.25 (kexue.fm 10001 has sqrt(in/rank), which gives 90.5)",
        expected=45.25,
        tolerance=relative(0.15),
        measure=lambda: _norm_ratio(4096, 1024, 8, variance_of_b=1 / 8),
        control=lambda: _norm_ratio(4096, 1024, 8, variance_of_b=1 / 1024),
        seconds=0.3,
    ),
    Claim(
        name="square-root-of-the-width",
        statement="slope of that ratio in the width, square weights of 256 to 4096; control: B of variance 1/width",
        source="kexue.fm 10001: O(sqrt n); the paper's infinite-width argument gives O(n)",
        expected=0.5,
        tolerance=absolute(0.05),
        measure=lambda: _slope(natural=True),
        control=lambda: _slope(natural=False),
        seconds=0.5,
    ),
    Claim(
        name="embeddings-have-their-group",
        statement="factors of an adapted embedding at the embeddings' rate; control: the type of the parameter",
        source="design: PEFT's helper asks the parameter, not the module, whether it is an embedding, and finds none",
        expected=2,
        tolerance=exact(),
        measure=lambda: _embedding_factors(by_substring=False),
        control=lambda: _embedding_factors(by_substring=True),
        seconds=0.1,
    ),
)
