"""Lion: a step of exactly the learning rate, what the past counts in it, and the box that its decay draws."""

from collections.abc import Callable, Sequence

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
