"""Flow matching: learn the velocity of the straight path from data to noise."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from danlu._draws import normal
from danlu._validate import literals, number
from danlu.diffusion import (
    Denoiser,
    Flow,
    Progress,
    TimesConfig,
    UniformTimes,
    euler,
    heun,
    prior,
    time_grid,
    upsample_guidance,
)
from danlu.objectives._images import ImageObjective, check_sampling, class_labels, guided_call, mean_square
from danlu.protocols import Batch

__all__ = ["FlowMatching", "FlowMatchingConfig"]

FLOW = Flow()


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """How the velocity is learned.

    Attributes:
        times: distribution of the training times.
        label_dropout: share of images whose class label is hidden from the network, so that it can be guided.
        sampler: ``euler`` or ``heun`` (two evaluations per step).
    """

    times: TimesConfig = field(default_factory=UniformTimes)
    label_dropout: float = 0.1
    sampler: Literal["euler", "heun"] = "euler"

    def __post_init__(self) -> None:
        number("label_dropout", self.label_dropout, low=0, high=1)
        literals(self)

    def build(self, model: nn.Module, **others: Any) -> "FlowMatching":
        """Make the objective around a network; see :class:`FlowMatching` for its arguments."""
        return FlowMatching(model, self)


class FlowMatching(ImageObjective):
    """Mean square of ``v(x_t, t) - (eps - x_0)`` with ``x_t = (1 - t) x_0 + t eps``, summed over images.

    Its minimiser is the velocity ``E[eps - x_0 | x_t]`` that carries noise to data. Source: Lipman et al.,
    arXiv:2210.02747; Liu et al., arXiv:2209.03003.

    Args:
        model: a network ``net(x, t, classes)``; held as ``self.model``. Its ``num_classes`` (0 or absent for none)
            stands for "no class".
        config: see :class:`FlowMatchingConfig`.

    A batch is a mapping with ``images`` ``(b, c, h, w)`` in [-1, 1] and, for a model with classes, ``labels`` ``(b,)``.
    """

    def __init__(self, model: nn.Module, config: FlowMatchingConfig | None = None) -> None:
        super().__init__(model)
        self.config = FlowMatchingConfig() if config is None else config

    def _loss(self, batch: Batch, keys: Tensor) -> Tensor:
        x0, config = batch["images"], self.config
        t = config.times.draw(len(x0), FLOW, device=x0.device, keys=keys).to(x0.dtype)
        eps = normal(keys, "noise", *x0.shape[1:], dtype=x0.dtype)
        classes = class_labels(self.model, batch.get("labels"), len(x0), dropout=config.label_dropout, keys=keys)
        return mean_square(self.model(FLOW.noised(x0, eps, t), t, classes) - (eps - x0)).sum()

    @property
    def schedule(self) -> Flow:
        """The schedule of :meth:`denoiser`."""
        return FLOW

    def denoiser(
        self, shape: Sequence[int], *, labels: Tensor | None = None, guidance: float | None = None, upsample: int = 1
    ) -> Denoiser:
        """Return the model as a function ``(x, t) -> x0`` of images ``shape``; arguments as in :meth:`sample`."""
        _, classes = check_sampling(self.model, tuple(shape), labels, guidance)
        velocity = guided_call(self.model, self.model, classes, guidance)
        return upsample_guidance(lambda x, t: x - t.view(-1, 1, 1, 1) * velocity(x, t), FLOW, upsample)

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
        """Draw images by following the velocity from noise.

        Args:
            shape: ``(n, c, h, w)``.
            steps: of the sampler.
            generator: on the model's device; the same seed draws the same images.
            labels: class labels, int64 ``(n,)``; None draws without classes.
            guidance: scale of classifier-free guidance; None and 1 are the conditional model itself.
            upsample: ``shape`` is this many times as high and wide as the training images
                (:func:`danlu.diffusion.upsample_guidance`).
            trajectory: return all states, ``(steps + 1, n, c, h, w)``, the images last.
            progress: called with the number of steps done and their total.

        Raises:
            ValueError: an argument is out of range, or the labels do not fit the model.
        """
        denoise = self.denoiser(shape, labels=labels, guidance=guidance, upsample=upsample)
        x = prior(shape, FLOW, generator=generator, device=next(self.model.parameters()).device)
        method = euler if self.config.sampler == "euler" else heun
        return method(denoise, x, FLOW, time_grid(FLOW, steps), trajectory=trajectory, progress=progress)
