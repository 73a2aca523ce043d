r"""Score matching: four losses with the same minimiser, the score ``grad ln p_t`` of the noisy data.

With ``x_t = a x_0 + b eps`` and a model s of the score,

* explicit: ``SM = E |grad ln p_t(x_t) - s|^2``, computable only where the score is known;
* conditional (denoising): ``CSM = E |grad ln p(x_t | x_0) - s|^2 = E |-eps / b - s|^2`` (Vincent 2011);
* implicit: ``E [|s|^2 + 2 tr grad s] = SM - E |grad ln p_t|^2`` by parts (Hyvarinen 2005), the trace by random probes;
* sliced: ``E [(v.s)^2 + 2 v.(grad s) v]`` along random directions v (Song et al., arXiv:1905.07088).

``CSM - SM`` does not depend on s: it is ``d / b^2 - E |grad ln p_t|^2 = a^2 E tr Cov(x_0 | x_t) / b^4``, so that the
minimum of CSM is not zero, and grows without bound as b goes to 0: losses here are weighted by ``b^2``. As estimators
they differ: CSM is unbiased for every batch size, while the marginal score written as a ratio of means over the same
x_0 (:func:`ratio_score`) is biased for any finite number of them. Source: kexue.fm 9509.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from danlu._draws import bernoulli, fresh, normal
from danlu._validate import integer, literals, number
from danlu.diffusion import (
    Cosine,
    Progress,
    ScheduleConfig,
    TimesConfig,
    UniformTimes,
    broadcast,
    ddim,
    prior,
    time_grid,
    to_x0_eps,
)
from danlu.objectives._images import ImageObjective, check_sampling, class_labels, guided_call
from danlu.protocols import Batch

__all__ = [
    "ScoreMatching",
    "ScoreMatchingConfig",
    "conditional_loss",
    "explicit_loss",
    "implicit_loss",
    "ratio_score",
    "sliced_loss",
]

Score = Callable[[Tensor], Tensor]


def explicit_loss(score: Tensor, true_score: Tensor) -> Tensor:
    """Return ``|true_score - score|^2`` of each row, ``(b,)``, of scores ``(b, ...)``."""
    return _square(true_score - score)


def conditional_loss(score: Tensor, eps: Tensor, b: Tensor) -> Tensor:
    """Return ``|-eps / b - score|^2`` of each row, ``(b,)``: the score is that of ``x_t`` given ``x_0``.

    Args:
        score: of ``x_t = a x_0 + b eps``, ``(b, ...)``.
        eps: the noise, like ``score``.
        b: its standard deviation, ``(b,)`` or ``()``.

    >>> conditional_loss(torch.zeros(1, 3), torch.ones(1, 3), torch.tensor(0.5))
    tensor([12.])
    """
    return _square(-eps / broadcast(b, eps) - score)


def implicit_loss(
    score: Score,
    x: Tensor,
    *,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Return ``|s|^2 + 2 tr grad s`` of each row, ``(b,)``; the true score is not needed.

    Args:
        score: s, a function of ``x`` that treats rows independently.
        x: ``(b, ...)``.
        probes: number of random sign vectors v; ``v.(grad s) v`` estimates the trace without bias (Hutchinson). None:
            the exact trace, with one derivative per component.
        generator: source of the probes.
        keys: one for each row, int64 ``(b,)``, of which the probes are a function; None draws them by ``generator``.

    >>> x = torch.randn(5, 3)
    >>> torch.allclose(implicit_loss(lambda x: -x, x), x.square().sum(1) - 6)
    True
    """
    if probes is None:
        size = x[0].numel()
        trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for index in range(size):
            direction = torch.zeros_like(x).flatten(1)
            direction[:, index] = 1
            trace = trace + _curvature(score, x, direction.view_as(x))[1]
        return _square(score(x)) + 2 * trace
    integer("probes", probes)
    keys = fresh(len(x), device=x.device, generator=generator) if keys is None else keys
    parts = []
    for probe in range(probes):
        signs = bernoulli(keys, f"probe {probe}", 0.5, *x.shape[1:]).to(x.dtype) * 2 - 1
        value, curvature = _curvature(score, x, signs)
        parts.append(_square(value) + 2 * curvature)
    return torch.stack(parts).mean(0)


def sliced_loss(
    score: Score,
    x: Tensor,
    *,
    probes: int = 1,
    generator: torch.Generator | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Return the mean over directions v of ``(v.s)^2 + 2 v.(grad s) v`` of each row, ``(b,)``.

    The directions are normal, so that its mean over them is :func:`implicit_loss`; arguments as there.
    """
    integer("probes", probes)
    keys = fresh(len(x), device=x.device, generator=generator) if keys is None else keys
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for probe in range(probes):
        direction = normal(keys, f"probe {probe}", *x.shape[1:], dtype=x.dtype)
        value, curvature = _curvature(score, x, direction)
        total = total + (direction * value).flatten(1).sum(1) ** 2 + 2 * curvature
    return total / probes


def ratio_score(x: Tensor, x0: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Return ``sum_i grad p(x | x0_i) / sum_i p(x | x0_i)``: the score of a finite sample.

    It is a biased estimate of the score of the data. With one x_0 it is the conditional score ``-(x - a x_0) / b^2``;
    the bias falls as one over their number. The x_0 must be independent of those that made x: the score of a batch at
    its own noisy members hides the bias.

    Args:
        x: noisy points ``(n, d)``.
        x0: data for each, ``(n, m, d)``, or the same for all, ``(m, d)``.
        a, b: of the noise.

    >>> ratio_score(torch.tensor([[1.0]]), torch.tensor([[0.0]]), 1.0, 0.5)
    tensor([[-4.]])
    """
    offset = x.unsqueeze(1) - a * x0
    weight = torch.softmax(-offset.square().sum(-1) / (2 * b * b), dim=1)  # through logarithms: p underflows
    return -(weight.unsqueeze(-1) * offset).sum(1) / (b * b)


@dataclass(frozen=True, kw_only=True)
class ScoreMatchingConfig:
    """Which loss, on which noise.

    Attributes:
        loss: ``conditional``, ``implicit`` or ``sliced``. The last two see only noisy images, never the clean ones,
            and cost a second derivative.
        schedule: how much noise there is at each time.
        times: distribution of the training times. At vanishing noise the implicit losses have no lower bound: avoid
            times near 0.
        probes: random directions per image, for ``implicit`` and ``sliced``.
        label_dropout: share of images whose class label is hidden from the network.
    """

    loss: Literal["conditional", "implicit", "sliced"] = "conditional"
    schedule: ScheduleConfig = field(default_factory=lambda: Cosine(limit=15.0))
    times: TimesConfig = field(default_factory=lambda: UniformTimes(low=0.05))
    probes: int = 1
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        literals(self)
        integer("probes", self.probes)
        number("label_dropout", self.label_dropout, low=0, high=1)

    def build(self, model: nn.Module, **others: Any) -> "ScoreMatching":
        """Make the objective around a network; see :class:`ScoreMatching` for its arguments."""
        return ScoreMatching(model, self)


class ScoreMatching(ImageObjective):
    """Score matching on noisy images: ``b^2`` times the chosen loss, averaged over components, summed over images.

    The network predicts the noise, ``s = -output / b``, so that with ``conditional`` this is DDPM's loss. The implicit
    losses are lower by a constant and usually negative.

    Args:
        model: a network ``net(x, t, classes)``, held as ``self.model``; the implicit losses differentiate it with
            respect to x in forward mode. ``num_classes`` as in :class:`danlu.objectives.FlowMatching`.
        config: see :class:`ScoreMatchingConfig`.
    """

    def __init__(self, model: nn.Module, config: ScoreMatchingConfig | None = None) -> None:
        super().__init__(model)
        self.config = ScoreMatchingConfig() if config is None else config

    def _loss(self, batch: Batch, keys: Tensor) -> Tensor:
        x0, config = batch["images"], self.config
        t = config.times.draw(len(x0), config.schedule, device=x0.device, keys=keys).to(x0.dtype)
        eps = normal(keys, "noise", *x0.shape[1:], dtype=x0.dtype)
        x = config.schedule.noised(x0, eps, t)
        b = config.schedule.coefficients(t)[1]
        classes = class_labels(self.model, batch.get("labels"), len(x0), dropout=config.label_dropout, keys=keys)

        def score(x: Tensor) -> Tensor:
            output: Tensor = self.model(x, config.schedule.condition(t), classes)
            return -output.to(x.dtype) / broadcast(b, x)

        if config.loss == "conditional":
            loss = conditional_loss(score(x), eps, b)
        elif config.loss == "implicit":
            loss = implicit_loss(score, x, probes=config.probes, keys=keys)
        else:
            loss = sliced_loss(score, x, probes=config.probes, keys=keys)
        return (b * b * loss).sum() / x0[0].numel()

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        *,
        steps: int,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
        guidance: float | None = None,
        upsample: int = 1,
        trajectory: bool = False,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw images by DDIM with the learned score; arguments as :meth:`danlu.objectives.FlowMatching.sample`.

        Raises:
            ValueError: an argument is out of range, or the labels do not fit the model.
        """
        schedule = self.config.schedule
        device, classes = check_sampling(self.model, tuple(shape), labels, guidance, upsample=upsample)
        output = guided_call(
            lambda x, t, some: self.model(x, schedule.condition(t), some), self.model, classes, guidance
        )

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return to_x0_eps(output(x, t), x, t, schedule, "eps")[0].clamp(-1, 1)

        x = prior(shape, schedule, generator=generator, device=device)
        return ddim(denoise, x, schedule, time_grid(schedule, steps), trajectory=trajectory, progress=progress)


def _curvature(score: Score, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``s(x)`` and ``v.(grad s) v`` of each row."""
    value, slope, *_ = torch.func.jvp(score, (x,), (direction,))
    return value, (direction * slope).flatten(1).sum(1)


def _square(value: Tensor) -> Tensor:
    return value.square().flatten(1).sum(1)
