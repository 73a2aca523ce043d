r"""Denoising: predict the noise, the data, or a combination of both from noisy images, on any schedule.

Whatever the network predicts (:mod:`danlu.diffusion.prediction`), its minimiser is the mean of that quantity given
the noisy image, so all predictions describe the same denoiser ``E[x_0 | x_t]``. They differ in how errors at different
noise levels are weighted, and in what is easy for a network to represent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from danlu._draws import fresh, normal
from danlu._validate import integer, literals, number, positive
from danlu.diffusion import (
    Cosine,
    Denoiser,
    Prediction,
    Progress,
    ScheduleConfig,
    TimesConfig,
    UniformTimes,
    ddim,
    ddpm,
    from_x0_eps,
    heun,
    input_scale,
    prior,
    time_grid,
    to_x0_eps,
    upsample_guidance,
)
from danlu.objectives._images import ImageObjective, check_sampling, class_labels, guided_call, mean_square
from danlu.protocols import Batch

__all__ = ["Denoising", "DenoisingConfig", "multiscale_loss", "predict", "prediction_error"]


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """What the network predicts, and on which noise it is trained.

    Attributes:
        schedule: how much noise there is at each time.
        prediction: the quantity that the network predicts. Its mean squared error is the loss: for ``edm`` EDM's
            weighted loss, for ``eps`` DDPM's simple loss.
        times: distribution of the training times.
        data_std: standard deviation of the data, for ``edm``.
        resolutions: heights at which the error is compared, the image's own last: the loss is the sum over heights of
            the mean squared error of the averaged images, divided by the height (simple diffusion, section 3.2). It
            helps above about 256 pixels and harms a little below. Empty: the plain loss.
        label_dropout: share of images whose class label is hidden from the network, so that it can be guided.
        sampler: ``ddim``, ``ddpm`` (ancestral) or ``heun`` (second order, two evaluations per step).
        eta: share of the ancestral noise that ``ddim`` adds.
        clip: clip the sampler's denoised images to [-1, 1].
    """

    schedule: ScheduleConfig = field(default_factory=lambda: Cosine(limit=15.0))
    prediction: Prediction = "v"
    times: TimesConfig = field(default_factory=UniformTimes)
    data_std: float = 0.5
    resolutions: tuple[int, ...] = ()
    label_dropout: float = 0.1
    sampler: Literal["ddim", "ddpm", "heun"] = "ddim"
    eta: float = 0.0
    clip: bool = True

    def __post_init__(self) -> None:
        literals(self)
        positive("data_std", self.data_std)
        for resolution in self.resolutions:
            integer("resolutions", resolution)
        number("label_dropout", self.label_dropout, low=0, high=1)
        number("eta", self.eta, low=0, high=1)

    def build(self, model: nn.Module, **others: Any) -> "Denoising":
        """Make the objective around a network; see :class:`Denoising` for its arguments."""
        return Denoising(model, self)


class Denoising(ImageObjective):
    """Mean squared error of a prediction, summed over images.

    Sources: Ho et al., arXiv:2006.11239; Salimans and Ho, arXiv:2202.00512; Karras et al., arXiv:2206.00364;
    Hoogeboom et al., arXiv:2301.11093.

    Args:
        model: a network ``net(x, t, classes)``, held as ``self.model``; its t is ``schedule.condition`` of the time.
            ``num_classes`` as in :class:`danlu.objectives.FlowMatching`.
        config: see :class:`DenoisingConfig`.

    A batch is a mapping with ``images`` ``(b, c, h, w)`` in [-1, 1] and, for a model with classes, ``labels`` ``(b,)``.
    """

    def __init__(self, model: nn.Module, config: DenoisingConfig | None = None) -> None:
        super().__init__(model)
        self.config = DenoisingConfig() if config is None else config

    def _loss(self, batch: Batch, keys: Tensor) -> Tensor:
        x0, config = batch["images"], self.config
        classes = class_labels(self.model, batch.get("labels"), len(x0), dropout=config.label_dropout, keys=keys)
        error = prediction_error(self.model, config, x0, classes, keys=keys)
        if config.resolutions:
            return multiscale_loss(error, config.resolutions).sum()
        return mean_square(error).sum()

    @property
    def schedule(self) -> ScheduleConfig:
        """The schedule of :meth:`denoiser`."""
        return self.config.schedule

    def denoiser(
        self, shape: Sequence[int], *, labels: Tensor | None = None, guidance: float | None = None, upsample: int = 1
    ) -> Denoiser:
        """Return the model as a function ``(x, t) -> x0`` of images ``shape``; arguments as in :meth:`sample`."""
        config = self.config
        _, classes = check_sampling(self.model, tuple(shape), labels, guidance)
        output = guided_call(lambda x, t, some: predict(self.model, config, x, t, some), self.model, classes, guidance)

        def unbounded(x: Tensor, t: Tensor) -> Tensor:
            return to_x0_eps(output(x, t), x, t, config.schedule, config.prediction, data_std=config.data_std)[0]

        guided = upsample_guidance(unbounded, config.schedule, upsample)
        return (lambda x, t: guided(x, t).clamp(-1, 1)) if config.clip else guided

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
        """Draw images by the configured sampler; arguments as :meth:`danlu.objectives.FlowMatching.sample`.

        Raises:
            ValueError: an argument is out of range, or the labels do not fit the model.
        """
        config = self.config
        denoise = self.denoiser(shape, labels=labels, guidance=guidance, upsample=upsample)
        device = next(self.model.parameters()).device
        x = prior(shape, config.schedule, generator=generator, device=device)
        times = time_grid(config.schedule, steps)
        if config.sampler == "heun":
            return heun(denoise, x, config.schedule, times, trajectory=trajectory, progress=progress)
        if config.sampler == "ddpm":
            return ddpm(
                denoise, x, config.schedule, times, generator=generator, trajectory=trajectory, progress=progress
            )
        return ddim(
            denoise,
            x,
            config.schedule,
            times,
            eta=config.eta,
            generator=generator,
            trajectory=trajectory,
            progress=progress,
        )


def predict(
    model: Callable[..., Tensor], config: DenoisingConfig, x: Tensor, t: Tensor, classes: Tensor | None
) -> Tensor:
    """Return the network's prediction for noisy images ``x`` ``(b, c, h, w)`` at times ``t`` ``(b,)``.

    Its input is scaled as the prediction requires, and its time is the schedule's ``condition``.
    """
    given = input_scale(x, t, config.schedule, config.prediction, data_std=config.data_std)
    output: Tensor = model(given, config.schedule.condition(t), classes)
    return output


def prediction_error(
    model: Callable[..., Tensor],
    config: DenoisingConfig,
    x0: Tensor,
    classes: Tensor | None,
    *,
    generator: torch.Generator | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Return prediction minus target, like ``x0``, at times and with noise drawn as ``config`` says.

    They are functions of ``keys``, int64 ``(b,)``, which are drawn by ``generator`` if they are not given.
    """
    keys = fresh(len(x0), device=x0.device, generator=generator) if keys is None else keys
    t = config.times.draw(len(x0), config.schedule, device=x0.device, keys=keys).to(x0.dtype)
    eps = normal(keys, "noise", *x0.shape[1:], dtype=x0.dtype)
    target = from_x0_eps(x0, eps, t, config.schedule, config.prediction, data_std=config.data_std)
    return predict(model, config, config.schedule.noised(x0, eps, t), t, classes) - target


def multiscale_loss(error: Tensor, resolutions: Sequence[int]) -> Tensor:
    """Return the sum over d of ``mean square of (error averaged down to d x d) / d``, for each image, ``(b,)``.

    Averaging s x s pixels divides the variance of independent errors by ``s^2``, so that at low resolutions the error
    of the coarse structure remains. Source: Hoogeboom et al., arXiv:2301.11093, section 3.2.

    Args:
        error: ``(b, c, h, w)`` with h = w.
        resolutions: heights d that divide h.

    Raises:
        ValueError: a resolution does not divide the height.

    >>> multiscale_loss(torch.ones(1, 3, 8, 8), (2, 8))
    tensor([0.6250])
    """
    size = error.shape[-1]
    if error.shape[-2] != size or any(size % resolution for resolution in resolutions):
        raise ValueError(
            f"resolutions must divide the height and width of the images, {tuple(error.shape[-2:])}, got {resolutions}"
        )
    parts = [mean_square(avg_pool2d(error, size // resolution)) / resolution for resolution in resolutions]
    return torch.stack(parts).sum(0)
