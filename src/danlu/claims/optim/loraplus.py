"""LoRA+: the ratio of the rates and what keeps it, ratio 1, the balance of the gradients, adapters on embeddings."""

import copy
import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from danlu.claims.frame import Claim, absolute, exact, relative
from danlu.nn import LoRAConfig, LoRALinear, apply_lora
from danlu.optim import Cosine, balanced_ratio, loraplus_groups, schedule, watch_ratio


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


@functools.cache
def _norm_ratio(n: int, m: int, rank: int, *, variance_of_b: float, seeds: int = 3) -> float:
    """Geometric mean over seeds of the 1-norm of A's gradient over that of B's, all activations of size one."""
    logs = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            layer = LoRALinear(nn.Linear(n, m, bias=False), LoRAConfig(rank=rank))
        with torch.no_grad():
            layer.lora_B.normal_(std=variance_of_b**0.5, generator=generator)
        x, upstream = (torch.randn(32, size, generator=generator) for size in (n, m))
        (layer(x) * upstream).sum().backward()
        grads = layer.lora_A.grad, layer.lora_B.grad
        assert grads[0] is not None
        assert grads[1] is not None
        logs.append(math.log(grads[0].abs().sum() / grads[1].abs().sum()))
    return math.exp(sum(logs) / seeds)


_SIZES = ((2048, 512, 8), (1024, 256, 4), (512, 512, 16))


def _balance(*, published: bool) -> float:
    """Geometric mean, over three layers, of the measured ratio of 1-norms over that of the formula."""
    logs = []
    for n, m, rank in _SIZES:
        formula = n / m * math.sqrt(n / rank) if published else balanced_ratio(n, m, rank)
        logs.append(math.log(_norm_ratio(n, m, rank, variance_of_b=1 / rank) / formula))
    return math.exp(sum(logs) / len(logs))


def _slope(*, natural: bool) -> float:
    """Log-log slope of that ratio in the width, from 128 to 2048 at rank 8."""
    narrow, wide = (_norm_ratio(n, n, 8, variance_of_b=1 / 8 if natural else 1 / n) for n in (128, 2048))
    return math.log(wide / narrow) / math.log(16)


def _misplaced(*, by_square: bool) -> float:
    """Parameters whose rate is not the one of their kind: LoRA+'s, with each layer's own ratio where that is asked for.

    The control takes (in/out) sqrt(in/rank), which is right for square layers alone.
    """
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Embedding(13, 8), nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8), nn.Linear(8, 8)
    )
    model = apply_lora(model, LoRAConfig(rank=2, exclude=()))
    for name in ("1.base.bias", "3.base.weight"):
        model.get_parameter(name).requires_grad_(True)
    ratios = {1: (8, 32), 3: (32, 8), 4: (8, 8)}
    misses = 0
    for ratio in ("auto", 4.0):
        rates = {}
        for group in loraplus_groups(model, 1e-3, ratio, embedding_lr=1e-5, weight_decay=0.1):
            for name, parameter in zip(group["param_names"], group["params"]):
                rates[name] = (group["lr"], group["weight_decay"], parameter is model.get_parameter(name))
        for name, (lr, decay, same) in rates.items():
            index = int(name.partition(".")[0])
            expected = 1e-5 if "embedding" in name else 1e-3
            if ratio != "auto" and ("lora_B" in name or name.endswith("bias")):
                expected = 4e-3
            elif "lora_B" in name:
                n, m = ratios[index]
                expected *= max(1.0, n / m * math.sqrt((n if by_square else m) / 2))
            misses += not (math.isclose(lr, expected) and same and decay == (0.0 if name.endswith("bias") else 0.1))
        misses += len(rates) != 10
    return float(misses)


def _warnings(*, multiplied: bool) -> float:
    """Warnings of eight steps whose schedule keeps the ratio, or bounds all rates from below by one number."""
    optimizer = AdamW(loraplus_groups(_adapted(), 1e-3))
    scheduler: LRScheduler = (
        schedule(optimizer, Cosine(warmup=0, floor=0.1), 8)
        if multiplied
        else CosineAnnealingLR(optimizer, 8, eta_min=1e-4)
    )
    handle = watch_ratio(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            optimizer.step()
            scheduler.step()
    handle.remove()
    return float(sum("LoRA+" in str(warning.message) for warning in caught))


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
        statement="1-norm of A's gradient over that of B's, three adapted layers, over (in/out) sqrt(out/rank); "
        "control: sqrt(in/rank)",
        source="derivation (kexue.fm 10001 has sqrt(in/rank), the same for square layers)",
        expected=1.0,
        tolerance=relative(0.05),
        measure=lambda: _balance(published=False),
        control=lambda: _balance(published=True),
        seconds=0.5,
    ),
    Claim(
        name="square-root-of-the-width",
        statement="slope of that ratio in the width, square layers of 128 to 2048; control: B of variance 1/width",
        source="kexue.fm 10001: O(sqrt n); the paper's infinite-width argument gives O(n)",
        expected=0.5,
        tolerance=absolute(0.05),
        measure=lambda: _slope(natural=True),
        control=lambda: _slope(natural=False),
        seconds=0.5,
    ),
    Claim(
        name="groups",
        statement="parameters of two sets of ten whose rate or decay is not that of their kind; control: the ratio of "
        "square layers",
        source="Hayou et al., arXiv 2402.12354, and the balance of the gradients",
        expected=0,
        tolerance=exact(),
        measure=lambda: _misplaced(by_square=False),
        control=lambda: _misplaced(by_square=True),
        seconds=0.1,
    ),
    Claim(
        name="watched",
        statement="warnings in eight steps with rates bounded from below by one number; control: rates multiplied",
        source="design: one warning when the ratio is lost",
        expected=1,
        tolerance=exact(),
        measure=lambda: _warnings(multiplied=False),
        control=lambda: _warnings(multiplied=True),
        seconds=0.1,
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
