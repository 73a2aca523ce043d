r"""How large gradients are, how much a step along them lowers the loss, and why clipping at a norm of 1 is natural.

To first order a step :math:`-\eta u` lowers the loss by :math:`\eta\, u \cdot g`: by :math:`\eta \lVert g \rVert^2` for
gradient descent, and by :math:`\eta \lVert g \rVert_1 = \eta \sqrt{N} \lVert g \rVert \cos(\mathrm{sign}\, g, g)` for
sign descent, which Adam is close to. Late in a converging run one step lowers the loss by far less than :math:`\eta`,
so :math:`\lVert g \rVert < 1` whatever the size of the model. This is a tendency, not a theorem.

Source: kexue.fm 10657.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from danlu._validate import choice, integer, positive

__all__ = ["GradientSize", "NormSummary", "drop_ratio", "gradient_size", "norm_summary", "rate_for_size"]


class GradientSize(NamedTuple):
    """The gradients of a model taken as one vector g.

    Attributes:
        norm: Euclidean norm: the drop of the loss by gradient descent is ``lr * norm**2``.
        sum: 1-norm: the drop by sign descent is ``lr * sum``.
        nonzero: number of entries that are not zero.
        cosine: of the angle between g and its sign, ``sum / (sqrt(nonzero) * norm)``: 0.798 for Gaussian entries,
            less for heavier tails, 0 if there is no gradient.
    """

    norm: float
    sum: float
    nonzero: int
    cosine: float


@torch.no_grad()
def gradient_size(parameters: Iterable[Tensor]) -> GradientSize:
    """Measure the gradients of the last backward pass (the parameters' ``grad``) in float64.

    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> weight.grad = torch.tensor([3.0, -4.0, 0.0])
    >>> gradient_size([weight])
    GradientSize(norm=5.0, sum=7.0, nonzero=2, cosine=0.98...)
    """
    found = {id(p): p.grad for p in parameters if p.grad is not None}
    grads = [grad.double() for grad in found.values()]
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    total = sum(float(g.abs().sum()) for g in grads)
    nonzero = sum(int(g.count_nonzero()) for g in grads)
    return GradientSize(norm, total, nonzero, total / (math.sqrt(nonzero) * norm) if norm else 0.0)


def drop_ratio(
    loss: Callable[[], Tensor], parameters: Iterable[Tensor], lr: float, rule: Literal["descent", "sign"] = "descent"
) -> float:
    """Return the measured drop of the loss in one step over the drop that the first order predicts.

    It is 1 for a small enough step. Well below 1 the learning rate is too large for the curvature (or the loss too
    noisy); below 0 the step raises the loss.

    Args:
        loss: computes the loss of one fixed batch, without randomness, precisely enough for the drop to show.
        parameters: what the step updates. They and their ``grad`` are restored afterwards.
        lr: learning rate of the step.
        rule: ``descent`` steps along g, ``sign`` along its sign.

    Raises:
        ValueError: no parameter requires a gradient, or the gradient is zero.

    >>> weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    >>> round(drop_ratio(lambda: weight.square().sum() / 2, [weight], lr=0.1), 6)  # 1 - lr / 2
    0.95
    """
    positive("lr", lr)
    choice("rule", rule, ("descent", "sign"))
    moved = [p for p in dict.fromkeys(parameters) if p.requires_grad]
    if not moved:
        raise ValueError("parameters must hold at least one that requires a gradient, got none")
    with torch.enable_grad():
        before = loss()
        grads = torch.autograd.grad(before, moved, allow_unused=True)
    pairs = [(p, g) for p, g in zip(moved, grads) if g is not None]
    steps = [g if rule == "descent" else g.sign() for _, g in pairs]
    predicted = lr * sum(float((u.double() * g.double()).sum()) for u, (_, g) in zip(steps, pairs))
    if not predicted:
        raise ValueError("the gradient is zero: the first order predicts no drop")
    held = [p.detach().clone() for p, _ in pairs]
    with torch.no_grad():
        try:
            for (p, _), u in zip(pairs, steps):
                p.sub_(u, alpha=lr)
            after = loss()
        finally:
            for (p, _), value in zip(pairs, held):
                p.copy_(value)
    return (float(before.detach()) - float(after)) / predicted


class NormSummary(NamedTuple):
    """Gradient norms of a run compared with a clipping threshold.

    Attributes:
        median: of the norms.
        p95: their 95th percentile.
        share_above: share of the steps that are clipped.
        verdict: ``never`` (the threshold has no effect), ``sometimes`` (a minority of the steps, as intended), or
            ``mostly`` (at least half: the gradient is normalised rather than clipped).
    """

    median: float
    p95: float
    share_above: float
    verdict: Literal["never", "sometimes", "mostly"]


def norm_summary(norms: Sequence[float] | Tensor, threshold: float = 1.0) -> NormSummary:
    """Summarise the gradient norms of a run as ``clip_grad_norm_`` returns them; leave out its first steps.

    >>> norm_summary([0.5, 0.75, 0.625, 3.0, 0.5])
    NormSummary(median=0.625, p95=2.5..., share_above=0.2, verdict='sometimes')
    """
    positive("threshold", threshold)
    values = torch.as_tensor(norms, dtype=torch.float64).flatten()
    if not len(values) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"norms must be finite numbers, at least one, got {len(values)}")
    middle, high = torch.quantile(values, torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    above = float((values > threshold).double().mean())
    verdict: Literal["never", "sometimes", "mostly"] = (
        "sometimes" if 0 < above < 0.5 else "mostly" if above else "never"
    )
    return NormSummary(middle, high, above, verdict)


def rate_for_size(lr: float, parameters: int, new_parameters: int) -> float:
    """Return the learning rate of sign descent or Adam that keeps the drop per step at another number of parameters.

    The norm of the gradient and its cosine to the sign are about the same at all sizes. The drop per step is then
    proportional to ``lr * sqrt(N)``: with four times the parameters the learning rate is halved.

    >>> rate_for_size(1e-3, 10**8, 4 * 10**8)
    0.0005
    """
    positive("lr", lr)
    integer("parameters", parameters)
    integer("new_parameters", new_parameters)
    return lr * math.sqrt(parameters / new_parameters)
