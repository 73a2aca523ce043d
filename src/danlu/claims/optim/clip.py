"""Gradient clipping: the norm and direction it leaves, why its norm is 1, and gradients that are not finite."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from danlu.claims.frame import Claim, absolute, at_most, exact, relative
from danlu.optim import clip_grad_norm_, clip_groups_, descent_factor, nonfinite_gradients


def _parameters(scale: float = 10.0) -> list[nn.Parameter]:
    """Three parameters with Gaussian gradients of different sizes."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, shape in enumerate(((7, 11), (13,), (3, 5, 2))):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = scale / (index + 1) * torch.randn(shape, generator=generator)
        made.append(parameter)
    return made


def _flat(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])


def _each_apart(parameters: list[nn.Parameter]) -> None:
    clip_groups_([{"params": [p]} for p in parameters])


def _norm_error(clip: Callable[[list[nn.Parameter]], object]) -> float:
    """Distance of the clipped global norm from 1."""
    parameters = _parameters()
    clip(parameters)
    return abs(float(_flat(parameters).norm()) - 1)


def _turned(clip: Callable[[list[nn.Parameter]], object]) -> float:
    """1 minus the cosine between the gradient before and after."""
    parameters = _parameters()
    before = _flat(parameters)
    clip(parameters)
    return 1 - float(nn.functional.cosine_similarity(before, _flat(parameters), dim=0))


def _overflow_error(clip: Callable[[list[nn.Parameter], float], Tensor]) -> float:
    """Relative error of the norm of gradients near 1e30, whose squares float32 cannot hold."""
    parameters = _parameters(1e30)
    expected = float(_flat(parameters).norm())
    return abs(float(clip(parameters, 1.0)) / expected - 1)


def _sign_cosine(*, heavy: bool) -> float:
    """Cosine between a random gradient and its sign: Gaussian, or Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(500_000, generator=generator)
    if heavy:
        g = g / torch.randn(500_000, 3, generator=generator).square().mean(-1).sqrt()
    return float(nn.functional.cosine_similarity(g, g.sign(), dim=0))


def _drop_over_prediction(lr: float) -> float:
    """Actual drop of a classifier's loss by one step of gradient descent over lr times the squared norm."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (64,), generator=generator)
    first = torch.randn(32, 16, generator=generator, dtype=torch.float64) / 4
    second = torch.randn(10, 32, generator=generator, dtype=torch.float64) / 6
    weights = [first.requires_grad_(), second.requires_grad_()]

    def loss(hidden: Tensor, out: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.tanh(x @ hidden.mT) @ out.mT, y)

    before = loss(*weights)
    grads = torch.autograd.grad(before, weights)
    with torch.no_grad():
        after = loss(*(w - lr * g for w, g in zip(weights, grads)))
        return float((before - after) / (lr * sum(g.square().sum() for g in grads)))


def _capped_drop(*, by_descent: bool) -> float:
    """Predicted drop of the loss, over the learning rate, of gradient descent clipped at a norm of 10."""
    g = torch.tensor([6.0, 8.0], dtype=torch.float64)
    factor = descent_factor([g], [g]) if by_descent else 1 / g.norm()
    return float(factor * (g @ g))


def _blamed(clip: Callable[[list[nn.Parameter]], object]) -> float:
    """How many of three parameters are not finite after clipping, when one was before."""
    parameters = _parameters()
    grad = parameters[1].grad
    assert grad is not None
    grad[0] = math.nan
    clip(parameters)
    return float(len(nonfinite_gradients((str(i), p) for i, p in enumerate(parameters))))


CLAIMS = (
    Claim(
        name="norm",
        statement="distance of the clipped norm of three tensors from the threshold 1; control: each clipped apart",
        source="Pascanu et al., arXiv 1211.5063, algorithm 1",
        expected=1e-6,
        tolerance=at_most(),
        measure=lambda: _norm_error(clip_grad_norm_),
        control=lambda: _norm_error(_each_apart),
        seconds=0.1,
    ),
    Claim(
        name="direction",
        statement="1 minus the cosine between gradient and clipped gradient; control: each tensor clipped apart",
        source="Pascanu et al., arXiv 1211.5063, algorithm 1",
        expected=1e-9,
        tolerance=at_most(),
        measure=lambda: _turned(clip_grad_norm_),
        control=lambda: _turned(_each_apart),
        seconds=0.1,
    ),
    Claim(
        name="no-overflow",
        statement="relative error of the norm of gradients near 1e30; control: torch.nn.utils.clip_grad_norm_",
        source="derivation: the norm fits float32, its square does not",
        expected=1e-6,
        tolerance=at_most(),
        measure=lambda: _overflow_error(clip_grad_norm_),
        control=lambda: _overflow_error(torch.nn.utils.clip_grad_norm_),
        seconds=0.1,
    ),
    Claim(
        name="sign-cosine",
        statement="cosine between a Gaussian gradient and its sign; control: Student's t, 3 degrees of freedom",
        source="kexue.fm 10657: sqrt(2 / pi), which makes Adam's rate fall as 1 / sqrt(parameters)",
        expected=math.sqrt(2 / math.pi),
        tolerance=absolute(0.002),
        measure=lambda: _sign_cosine(heavy=False),
        control=lambda: _sign_cosine(heavy=True),
        seconds=0.3,
    ),
    Claim(
        name="first-order-drop",
        statement="drop of a loss by one small step over lr |g|^2; control: a large step",
        source="kexue.fm 10657: the argument for a norm below 1",
        expected=1.0,
        tolerance=relative(0.01),
        measure=lambda: _drop_over_prediction(1e-3),
        control=lambda: _drop_over_prediction(3.0),
        seconds=0.1,
    ),
    Claim(
        name="descent-clipping-caps-the-drop",
        statement="predicted drop over lr at a norm of 10, descent clipped at 1; control: norm clipped at 1",
        source="kexue.fm 10657: rate times min(1, T / (u . g))",
        expected=1.0,
        tolerance=absolute(1e-12),
        measure=lambda: _capped_drop(by_descent=True),
        control=lambda: _capped_drop(by_descent=False),
        seconds=0.1,
    ),
    Claim(
        name="culprit-stays-known",
        statement="parameters with a NaN after clipping when one of three had it; control: torch's clip_grad_norm_",
        source="design: gradients are left alone when the norm is not finite",
        expected=1,
        tolerance=exact(),
        measure=lambda: _blamed(clip_grad_norm_),
        control=lambda: _blamed(lambda params: torch.nn.utils.clip_grad_norm_(params, 1.0)),
        seconds=0.1,
    ),
)
