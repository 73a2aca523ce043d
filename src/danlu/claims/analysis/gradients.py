"""Gradient norms: below 1 late in a run, the drop by sign descent, the cosine with zeros, rates over sizes."""

import functools
import math

import torch
from torch import Tensor, nn

from danlu.analysis import drop_ratio, gradient_size, norm_summary, rate_for_size
from danlu.claims.frame import Claim, absolute, at_most, relative


def _classifier(width: int = 64) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, inputs, and labels that a linear teacher gives with some noise."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(4096, 64, generator=generator)
    scores = x @ torch.randn(64, 10, generator=generator) + 2 * torch.randn(4096, 10, generator=generator)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)), x, scores.argmax(-1)


@functools.cache
def _late_norms() -> tuple[float, ...]:
    """Norms of the gradient at the last 200 of 300 steps of SGD, rate 0.1, batches of 256."""
    model, x, y = _classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for step in range(300):
        rows = slice(step % 16 * 256, (step % 16 + 1) * 256)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        norms.append(gradient_size(model.parameters()).norm)
        optimizer.step()
    return tuple(norms[100:])


def _late_median(*, summed: bool) -> float:
    """Median of those norms, of the mean loss or of the sum over a batch."""
    return norm_summary(_late_norms()).median * (256 if summed else 1)


def _sign_drop(lr: float) -> float:
    model, x, y = _classifier()
    model = model.double()
    return drop_ratio(
        lambda: nn.functional.cross_entropy(model(x[:256].double()), y[:256]), model.parameters(), lr, "sign"
    )


def _cosine(*, nonzero_only: bool) -> float:
    """Cosine between a Gaussian gradient with half its entries zero and its sign, by two counts of entries."""
    parameter = nn.Parameter(torch.zeros(1000, 1000))
    generator = torch.Generator().manual_seed(0)
    parameter.grad = torch.randn(1000, 1000, generator=generator)
    parameter.grad[::2] = 0
    size = gradient_size([parameter])
    return size.cosine if nonzero_only else size.sum / (math.sqrt(parameter.numel()) * size.norm)


def _growth_of_drop(*, scaled: bool) -> float:
    """Slope in N of the predicted drop by sign descent, the norm held at 1."""
    drops = []
    for count in (10_000, 1_000_000):
        parameter = nn.Parameter(torch.zeros(count))
        gradient = torch.randn(count, generator=torch.Generator().manual_seed(0))
        parameter.grad = gradient / gradient.norm()
        lr = rate_for_size(1e-3, 10_000, count) if scaled else 1e-3
        drops.append(lr * gradient_size([parameter]).sum)
    return math.log(drops[1] / drops[0]) / math.log(100)


CLAIMS = (
    Claim(
        name="late-norm-below-one",
        statement="median norm of a classifier's gradient after 100 of 300 steps; control: of the loss summed over 256",
        source="kexue.fm 10657: the long-run state of a run that converges; 0.72 for this width there",
        expected=1.0,
        tolerance=at_most(),
        measure=lambda: _late_median(summed=False),
        control=lambda: _late_median(summed=True),
        seconds=1.0,
    ),
    Claim(
        name="sign-descent-drop",
        statement="drop of a classifier's loss by a step of sign descent of 1e-5 over lr |g|_1; control: of 0.03",
        source="kexue.fm 10657: dL = -lr |g|_1",
        expected=1.0,
        tolerance=relative(0.01),
        measure=lambda: _sign_drop(1e-5),
        control=lambda: _sign_drop(0.03),
        seconds=0.2,
    ),
    Claim(
        name="cosine-counts-what-is-not-zero",
        statement="cosine between a Gaussian gradient, half of it zero, and its sign; control: zeros counted too",
        source="derivation: sqrt(2 / pi) over the entries that are not zero",
        expected=math.sqrt(2 / math.pi),
        tolerance=absolute(0.003),
        measure=lambda: _cosine(nonzero_only=True),
        control=lambda: _cosine(nonzero_only=False),
        seconds=0.2,
    ),
    Claim(
        name="rate-falls-as-the-root-of-the-size",
        statement="slope of the predicted drop in the number of parameters at rates ~ 1 / sqrt N; control: one rate",
        source="kexue.fm 10657: four times the parameters, half the rate",
        expected=0.0,
        tolerance=absolute(0.01),
        measure=lambda: _growth_of_drop(scaled=True),
        control=lambda: _growth_of_drop(scaled=False),
        seconds=0.2,
    ),
)
