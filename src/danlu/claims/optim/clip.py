"""Gradient clipping: the norm and direction it leaves, why its norm is 1, and gradients that are not finite."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from danlu.claims.frame import Claim, absolute, at_most, exact, relative
from danlu.optim import NonFiniteGuard, clip_grad_norm_, clip_groups_, descent_factor, nonfinite_gradients


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
    """Cosine between a random gradient and its sign, from what clips sign descent: Gaussian, or Student's t."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(500_000, generator=generator)
    if heavy:
        g = g / torch.randn(500_000, 3, generator=generator).square().mean(-1).sqrt()
    g = g / g.norm()
    return 1 / float(descent_factor([g.sign()], [g])) / math.sqrt(500_000)


def _drop_over_prediction(*, as_if_norm: bool) -> float:
    """Drop of a classifier's loss by a small step along its clipped gradient, over lr |g| and the clipped norm."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (64,), generator=generator)
    first = torch.randn(32, 16, generator=generator, dtype=torch.float64) / 4
    second = torch.randn(10, 32, generator=generator, dtype=torch.float64) / 6
    weights = [nn.Parameter(first), nn.Parameter(second)]

    def loss() -> Tensor:
        return nn.functional.cross_entropy(torch.tanh(x @ weights[0].mT) @ weights[1].mT, y)

    before = loss()
    before.backward()
    norm = clip_grad_norm_(weights, 0.1)
    torch.optim.SGD(weights, lr=1e-4).step()
    return float((before - loss()).detach() / (1e-4 * norm * (norm if as_if_norm else 0.1)))


def _capped_drop(*, by_descent: bool) -> float:
    """Predicted drop of the loss, over the learning rate, of gradient descent clipped at a norm of 10."""
    g = torch.tensor([6.0, 8.0], dtype=torch.float64)
    factor = descent_factor([g], [g]) if by_descent else 1 / g.norm()
    return float(factor * (g @ g))


def _guarded(patience: int) -> float:
    """Steps taken, and a hundred for each one skipped, of eight gradients of which four are not finite."""
    guard, weight = NonFiniteGuard(patience), nn.Parameter(torch.zeros(3))
    logging.getLogger("danlu.optim.clip").addFilter(_silent := lambda record: False)
    try:
        return _steps(guard, weight, patience)
    finally:
        logging.getLogger("danlu.optim.clip").removeFilter(_silent)


def _steps(guard: NonFiniteGuard, weight: nn.Parameter, patience: int) -> float:
    taken = 0
    for value in (1.0, math.nan, 1.0, math.nan, math.nan, 1.0, math.inf, 1.0):
        weight.grad = torch.full((3,), value)
        try:
            taken += guard.allows(clip_grad_norm_(weight), [("weight", weight)])
        except FloatingPointError:
            return float(taken + 1000)
        if guard.skipped == 2:
            told = guard.state_dict()
            guard = NonFiniteGuard(patience)
            guard.load_state_dict(told)
    return float(taken + 100 * guard.skipped + 10_000 * guard.consecutive)


def _factor_errors(limit: float) -> float:
    """Largest error of six factors of descent clipping at 2; the control clips at another limit."""
    ones = torch.ones(3)
    pairs = (
        ([ones], [ones], 2 / 3),
        ([ones / 3], [ones], 1.0),
        ([-ones], [ones], 1.0),
        ([2 * ones, ones.double()], [ones, ones.double()], 2 / 9),
        ([0 * ones], [ones], 1.0),
        ([ones.bfloat16()], [100 * ones], 2 / 300),
    )
    return max(abs(float(descent_factor(u, g, limit)) - expected) for u, g, expected in pairs)


def _group_errors(*, together: bool) -> float:
    """Largest error of norms and gradients of two groups clipped apart at 2 and 1; the control clips them as one."""
    worst = 0.0
    for limit in (1.0, 2.0):
        parameters = _parameters()
        before = [p.grad.clone() for p in parameters if p.grad is not None]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
        norms = [clip_grad_norm_(parameters, limit)] * 2 if together else clip_groups_(groups, limit)
        for group, found, old in zip(groups, norms, (before[:2], before[2:])):
            norm = torch.cat([g.flatten() for g in old]).norm()
            factor = min(1.0, limit / float(norm))
            errors = [(p.grad - g * factor).abs().max() for p, g in zip(group["params"], old) if p.grad is not None]
            worst = max(worst, abs(float(found / norm - 1)), *map(float, errors))
    return worst


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
        expected=1e-7,
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
        tolerance=absolute(0.001),
        measure=lambda: _sign_cosine(heavy=False),
        control=lambda: _sign_cosine(heavy=True),
        seconds=0.3,
    ),
    Claim(
        name="first-order-drop",
        statement="drop of a loss by one small step of a gradient clipped at 0.1, over 0.1 lr |g|; control: "
        "over lr |g|^2",
        source="kexue.fm 10657: the argument for a norm below 1",
        expected=1.0,
        tolerance=relative(1e-3),
        measure=lambda: _drop_over_prediction(as_if_norm=False),
        control=lambda: _drop_over_prediction(as_if_norm=True),
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
        name="descent-factors",
        statement="largest error of min(1, 2 / <u, g>) in six cases; control: a limit of 1",
        source="kexue.fm 10657; 1 where the product is not positive",
        expected=1e-6,
        tolerance=at_most(),
        measure=lambda: _factor_errors(2.0),
        control=lambda: _factor_errors(1.0),
        seconds=0.1,
    ),
    Claim(
        name="groups-apart",
        statement="largest error of norms and gradients of two groups, each clipped by itself; control: clipped as one",
        source="Pascanu et al., arXiv 1211.5063, algorithm 1, for each group",
        expected=1e-6,
        tolerance=at_most(),
        measure=lambda: _group_errors(together=False),
        control=lambda: _group_errors(together=True),
        seconds=0.1,
    ),
    Claim(
        name="guard",
        statement="four steps taken and four skipped of eight, at most two in a row, saved and restored between; "
        "control: a patience of one",
        source="design: an error after more than ``patience`` in a row",
        expected=404,
        tolerance=exact(),
        measure=lambda: _guarded(2),
        control=lambda: _guarded(1),
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
