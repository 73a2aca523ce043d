"""Lion: a step of exactly the learning rate, what the past counts in it, and the box that its decay draws."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu.claims.frame import Claim, at_most, exact, relative
from danlu.optim import Lion, Tiger

_Make = Callable[[list[nn.Parameter]], Optimizer]


def _end(make: _Make, gradients: Sequence[Tensor], start: float = 0.0) -> Tensor:
    """Where one weight, started at a constant, is after a step along each gradient."""
    weight = nn.Parameter(torch.full_like(gradients[0], start))
    optimizer = make([weight])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def _gaussian(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _step_error(make: _Make) -> float:
    """Largest distance of a coordinate's tenth step from the learning rate 0.125, relative."""
    gradients = [_gaussian(997, seed) for seed in range(10)]
    last = _end(make, gradients) - _end(make, gradients[:-1])
    return float((last.abs() / 0.125 - 1).abs().max())


def _box(*, decoupled: bool) -> float:
    """A weight at 50 after 100 steps of 0.01 along a constant gradient, decay 0.1."""
    options = {"lr": 0.01, "weight_decay": 0.1 if decoupled else 0.0}
    gradient = -torch.ones(1, dtype=torch.float64)
    return float(_end(lambda params: Lion(params, **options), [gradient] * 100, start=50.0))  # type: ignore[arg-type]


def _balance(betas: tuple[float, float]) -> float:
    """How many times the present gradient counts what the one before does, by bisection on where the sign flips."""
    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        gradients = [torch.ones(1, dtype=torch.float64), torch.full((1,), -middle, dtype=torch.float64)]
        end = float(_end(lambda params: Lion(params, lr=1.0, betas=betas), gradients))
        low, high = (low, middle) if end == 0.0 else (middle, high)
    return 1 / high


def _tiger_difference(betas: tuple[float, float]) -> float:
    """Largest difference between Lion and Tiger after 200 equal gradients."""
    gradients = [_gaussian(97, seed) for seed in range(200)]
    lion = _end(lambda params: Lion(params, lr=0.01, betas=betas, weight_decay=0.1), gradients)
    tiger = _end(lambda params: Tiger(params, lr=0.01, beta=betas[0], weight_decay=0.1, scale="none"), gradients)
    return float((lion - tiger).abs().max())


def _slots(make: _Make) -> float:
    """Elements of state for each element of a parameter, counters left out."""
    weight = nn.Parameter(torch.zeros(997))
    optimizer = make([weight])
    weight.grad = torch.ones(997)
    optimizer.step()
    held: int = sum(t.numel() for t in optimizer.state[weight].values() if t.numel() > 1)
    return held / 997


def _distance_from_formula(*, before_sign: bool) -> float:
    """Largest distance of weights and momenta from Lion in plain tensors; the control updates the momentum first."""
    worst = 0.0
    cases: tuple[dict[str, Any], ...] = (
        {"betas": (0.8, 0.95), "weight_decay": 0.3},
        {"betas": (0.9, 0.5), "maximize": True},
        {"foreach": True, "weight_decay": 0.2},
        {"lr": torch.tensor(0.02, dtype=torch.float64), "weight_decay": 0.1},
        {"foreach": True, "lr": torch.tensor(0.02, dtype=torch.float64)},
        {"momentum_dtype": torch.float32, "weight_decay": 0.1},
    )
    for case in cases:
        options = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.0, **case}
        first, second = options["betas"]
        weight = nn.Parameter(_gaussian(50, 99))
        optimizer = Lion([weight], **options)
        plain, momentum = weight.detach().clone(), torch.zeros(50, dtype=torch.float64)
        for seed in range(8):
            weight.grad = _gaussian(50, seed)
            if seed == 5:
                weight.grad[3] = torch.nan  # counts as zero
            grad = weight.grad.nan_to_num() * (-1 if options.get("maximize") else 1)
            optimizer.step()
            after = second * momentum + (1 - second) * grad
            direction = (first * (after if before_sign else momentum) + (1 - first) * grad).sign()
            plain = plain - float(options["lr"]) * (direction + options["weight_decay"] * plain)
            momentum = after
        held = optimizer.state[weight]["exp_avg"]
        scale = 1e-6 if held.dtype == torch.float32 else 1.0  # a momentum in float32 has float32's rounding
        worst = max(worst, float((weight.detach() - plain).abs().max()), scale * float((held - momentum).abs().max()))
    return worst


def _rounded(rounding: str) -> Tensor:
    """1024 bfloat16 weights after 20 small steps, in float32."""
    weight = nn.Parameter((1 + _gaussian(1024, 7)).bfloat16())
    optimizer = Lion([weight], lr=1e-4, weight_decay=0.1, momentum_dtype=torch.float32, rounding=rounding)
    for seed in range(20):
        weight.grad = _gaussian(1024, seed).bfloat16()
        optimizer.step()
    return weight.detach().float()


def _distance_from_float32(rounding: str) -> float:
    """Largest distance of rounded weights from the float32 weights rounded once, at the end."""
    weight = nn.Parameter((1 + _gaussian(1024, 7)).bfloat16().float())
    optimizer = Lion([weight], lr=1e-4, weight_decay=0.1, momentum_dtype=torch.float32)
    for seed in range(20):
        weight.grad = _gaussian(1024, seed).bfloat16().float()
        optimizer.step()
    return float((_rounded(rounding) - weight.detach().bfloat16().float()).abs().max())


def _mean_step(rounding: str) -> float:
    """Mean step of 2^16 bfloat16 weights of 1 to 2 along one gradient, over the learning rate of 2^-12."""
    start = (1 + torch.arange(2**16) % 128 / 128).bfloat16()
    weight = nn.Parameter(start.clone())
    optimizer = Lion([weight], lr=2.0**-12, rounding=rounding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is below the resolution is warned of
        for _ in range(4):
            weight.grad = -torch.ones_like(weight)
            optimizer.step()
    return float((weight.detach().double() - start.double()).mean()) * 2**10


CLAIMS = (
    Claim(
        name="step-is-the-rate",
        statement="relative distance of every coordinate's step from the learning rate; control: Adam",
        source="Chen et al., arXiv 2302.06675, section 3",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _step_error(lambda params: Lion(params, lr=0.125)),
        control=lambda: _step_error(lambda params: torch.optim.Adam(params, lr=0.125)),
        seconds=0.2,
    ),
    Claim(
        name="formula",
        statement="largest distance of weights and momenta after eight steps, six ways, from plain tensors; control: "
        "the momentum updated before the sign is taken",
        source="Chen et al., arXiv 2302.06675, algorithm 2; a NaN counts as zero",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _distance_from_formula(before_sign=False),
        control=lambda: _distance_from_formula(before_sign=True),
        seconds=0.1,
    ),
    Claim(
        name="compensated-is-float32",
        statement="largest distance of bfloat16 weights with compensation after 20 steps from float32 ones; control: "
        "stochastic rounding",
        source="derivation: 16 bits and the 16 that follow are the float32 weight",
        expected=0.0,
        tolerance=exact(),
        measure=lambda: _distance_from_float32("compensated"),
        control=lambda: _distance_from_float32("stochastic"),
        seconds=0.1,
    ),
    Claim(
        name="stochastic-steps-are-right-on-average",
        statement="mean of four steps of a quarter of the resolution, stochastically rounded, over the rate; control: "
        "to nearest",
        source="Gupta et al., arXiv 1502.02551: the mean is the exact step",
        expected=1.0,
        tolerance=relative(0.02),
        measure=lambda: _mean_step("stochastic"),
        control=lambda: _mean_step("nearest"),
        seconds=0.1,
    ),
    Claim(
        name="decay-box",
        statement="a weight at 50 after 100 steps of 0.01, decay 0.1, constant gradient; control: no decay",
        source="derivation: 1/decay + (50 - 1/decay) (1 - lr decay)^100",
        expected=10 + 40 * 0.999**100,
        tolerance=relative(1e-12),
        measure=lambda: _box(decoupled=True),
        control=lambda: _box(decoupled=False),
        seconds=0.2,
    ),
    Claim(
        name="present-over-past",
        statement="weight of the present gradient over that of the one before; control: equal betas",
        source="derivation: (1 - b1) / (b1 (1 - b2)) = 11.11",
        expected=0.1 / (0.9 * 0.01),
        tolerance=relative(1e-6),
        measure=lambda: _balance((0.9, 0.99)),
        control=lambda: _balance((0.9, 0.9)),
        seconds=0.3,
    ),
    Claim(
        name="equal-betas-are-tiger",
        statement="difference to Tiger after 200 steps with equal betas; control: the default betas",
        source="kexue.fm 9512",
        expected=0,
        tolerance=exact(),
        measure=lambda: _tiger_difference((0.9, 0.9)),
        control=lambda: _tiger_difference((0.9, 0.99)),
        seconds=0.3,
    ),
    Claim(
        name="one-state-buffer",
        statement="state elements for each weight; control: AdamW",
        source="Chen et al., arXiv 2302.06675, abstract",
        expected=1,
        tolerance=exact(),
        measure=lambda: _slots(Lion),
        control=lambda: _slots(torch.optim.AdamW),
        seconds=0.1,
    ),
)
