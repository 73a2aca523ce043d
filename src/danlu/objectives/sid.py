r"""SiD: distil a denoiser into a one-step generator, by comparing scores on the generated images.

There are three networks of one shape: the teacher phi, which denoises data and stays fixed; the generator theta, which
makes ``x_g = G(z)`` in one evaluation; the student score psi, which learns to denoise the generated images. With
``x_t = a x_g + b eps`` and the denoised images ``f_phi(x_t)``, ``f_psi(x_t)`` the generator minimises

    L2 - alpha L1 = E <f_phi - f_psi, (f_phi - x_g) - alpha (f_phi - f_psi)>,

where L1 = E |f_phi - f_psi|^2 is the distance of the two scores, and L2 = E <f_phi - f_psi, f_phi - x_g> has the same
value once psi is the best denoiser of x_g. With psi's parameters held constant their gradients differ: that of L1 alone
points away from the data wherever the generator is narrower than they are, and diverges; alpha = 1/2 is exactly half
the true gradient; about 1 works best. Sources: Zhou et al., arXiv:2404.04057; kexue.fm 10085 and 10567.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from danlu._draws import derived, normal, uniform
from danlu._validate import integer, number, positive
from danlu.config import Pretrained
from danlu.diffusion import EDM, LogNormalNoise, Progress, to_x0_eps
from danlu.objectives._images import ImageObjective, check_sampling, class_labels, mean_square
from danlu.objectives.denoising import Denoising, DenoisingConfig, predict, prediction_error
from danlu.objectives.draws import keys_of
from danlu.protocols import Batch

__all__ = ["SiD", "SiDConfig", "generator_loss"]

_LEVELS = EDM()


def _edm() -> DenoisingConfig:
    return DenoisingConfig(schedule=EDM(), prediction="edm", times=LogNormalNoise(), sampler="heun", clip=False)


@dataclass(frozen=True, kw_only=True)
class SiDConfig:
    """How a generator is distilled.

    Attributes:
        teacher: a finished run with the objective ``Denoising``; its weights initialise all three networks.
        denoising: the teacher's own configuration, which generator and student score share.
        alpha: weight of L1; the paper uses 1 to 1.2, and values from 0.75 work.
        sigma_init: noise over signal of the generator's input, which also gives the time on which it is conditioned.
        t_max: largest noise at which the scores are compared, as a time of EDM's schedule: 0.8 is sigma = 24.4.
    """

    teacher: Pretrained
    denoising: DenoisingConfig = field(default_factory=_edm)
    alpha: float = 1.2
    sigma_init: float = 2.5
    t_max: float = 0.8

    def __post_init__(self) -> None:
        number("alpha", self.alpha, low=0)
        positive("sigma_init", self.sigma_init)
        number("t_max", self.t_max, low=0, high=1, low_open=True)

    def build(self, model: nn.Module, *, pretrained: Callable[[Pretrained], Any] | None = None, **others: Any) -> "SiD":
        """Make the objective around a network of the teacher's shape.

        Args:
            model: as in :class:`SiD`.
            pretrained: function that returns the teacher's trained objective; None to sample only.
        """
        return SiD(model, self, teacher=None if pretrained is None else pretrained(self.teacher))


class SiD(ImageObjective):
    """The sum of the losses of generator and student score, each without a gradient into the other's parameters.

    One optimizer step updates both networks, each on fresh noise. The batch determines the number of images, their
    shape and their class labels; its pixels are not used. The generator is ``self.model``.

    Args:
        model: a network of the teacher's shape; its weights are replaced by the teacher's.
        config: see :class:`SiDConfig`.
        teacher: the trained objective of ``config.teacher``; None to sample only.

    Raises:
        TypeError: the teacher's objective is not ``Denoising``.
        ValueError: the teacher has another configuration or another shape.
    """

    sampling_steps = 1

    swaps_weights = True

    def __init__(self, model: nn.Module, config: SiDConfig, *, teacher: Denoising | None = None) -> None:
        super().__init__(model)
        self.config = config
        self._teacher: _Borrowed | None = None
        if teacher is not None:
            _check_teacher(teacher, model, config)
            self._teacher = _Borrowed(teacher.model.eval().requires_grad_(False))
            model.load_state_dict(teacher.model.state_dict())
        self.student = copy.deepcopy(model)
        self._last: Tensor | None = None

    @property
    def teacher(self) -> nn.Module:
        """The teacher's network.

        Raises:
            RuntimeError: there is none, because the objective was made to sample only.
        """
        if self._teacher is None:
            raise RuntimeError("this SiD has no teacher: it can sample, but neither train nor be evaluated")
        return self._teacher.module

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of the student score plus that of the generator, summed over images, float32."""
        classes, keys = self._classes(batch), keys_of(batch, batch["images"])
        apart = derived(keys, "student")  # generator and student see other noise
        with torch.no_grad():
            made = self.generate(self._noise(batch, apart), classes)
        student = mean_square(prediction_error(self.student, self.config.denoising, made, classes, keys=apart)).sum()
        x_g = self.generate(self._noise(batch, keys), classes)
        f_phi, f_psi = self._denoised(x_g, classes, keys)
        self._last = torch.stack([mean_square(f - x_g).mean() for f in (f_phi, f_psi)]).detach()
        return student + generator_loss(f_phi, f_psi, x_g, self.config.alpha).sum()

    def _loss(self, batch: Batch, keys: Tensor) -> Tensor:
        """Return the validation loss, L4 = E |f_phi - x|^2 - |f_psi - x|^2: an estimate of the scores' distance."""
        classes = self._classes(batch)
        x_g = self.generate(self._noise(batch, keys), classes)
        f_phi, f_psi = self._denoised(x_g, classes, keys)
        return (mean_square(f_phi - x_g) - mean_square(f_psi - x_g)).sum()

    def metrics(self) -> dict[str, float]:
        """Return ``score_gap``: the share by which the student denoises generated images better than the teacher.

        It falls to 0 as the generated images approach the teacher's training data. The loss itself says little, because
        the generator's part may have either sign.
        """
        if self._last is None:
            return {}
        by_teacher, by_student = self._last.tolist()
        return {"score_gap": 1 - by_student / by_teacher}

    def generate(self, z: Tensor, classes: Tensor | None) -> Tensor:
        """Return the generator's images for standard normal ``z`` ``(b, c, h, w)``."""
        schedule = self.config.denoising.schedule
        t = schedule.time(-2 * math.log(self.config.sigma_init))
        b = schedule.coefficients(t)[1].to(z.dtype)
        return self._x0(self.model, b * z, t.to(z).expand(len(z)), classes)

    def _classes(self, batch: Batch) -> Tensor | None:
        return class_labels(self.model, batch.get("labels"), len(batch["images"]))

    def _noise(self, batch: Batch, keys: Tensor) -> Tensor:
        like = batch["images"]
        return normal(keys, "latent", *like.shape[1:], dtype=like.dtype)

    def _x0(self, network: Callable[..., Tensor], x: Tensor, t: Tensor, classes: Tensor | None) -> Tensor:
        config = self.config.denoising
        output = predict(network, config, x, t, classes)
        return to_x0_eps(output, x, t, config.schedule, config.prediction, data_std=config.data_std)[0]

    def _denoised(self, x_g: Tensor, classes: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images as teacher and student denoise them from noise; gradients flow to x_g only."""
        schedule = self.config.denoising.schedule
        level = self.config.t_max * uniform(keys, "times")
        t = schedule.time(_LEVELS.logsnr(level.to(x_g.dtype)))
        eps = normal(keys, "noise", *x_g.shape[1:], dtype=x_g.dtype)
        x_t = schedule.noised(x_g, eps, t)
        constant = {name: value.detach() for name, value in self.student.named_parameters()}

        def student(*inputs: Tensor | None) -> Tensor:
            output: Tensor = torch.func.functional_call(self.student, constant, inputs)
            return output

        return self._x0(self.teacher, x_t, t, classes), self._x0(student, x_t, t, classes)

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        *,
        steps: int = 1,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
        guidance: float | None = None,
        upsample: int = 1,
        trajectory: bool = False,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw images in one step; arguments as :meth:`danlu.objectives.FlowMatching.sample`.

        Raises:
            ValueError: as there; or ``steps`` is not 1, or ``guidance`` is given.
        """
        integer("steps", steps)
        if steps != 1:
            raise ValueError(f"steps must be 1, got {steps}: a generator made by SiD takes one step")
        if guidance not in (None, 1):
            raise ValueError(f"guidance must be None for SiD, which takes it from a guided teacher; got {guidance}")
        device, classes = check_sampling(self.model, tuple(shape), labels, None, upsample=upsample)
        z = torch.randn(tuple(shape), generator=generator, device=device)
        images = self.generate(z, classes)
        if progress is not None:
            progress(1, 1)
        return torch.stack([z, images]) if trajectory else images


def generator_loss(f_phi: Tensor, f_psi: Tensor, x_g: Tensor, alpha: float, *, normalise: bool = True) -> Tensor:
    """Return ``<f_phi - f_psi, (f_phi - x_g) - alpha (f_phi - f_psi)>`` of each image, ``(b,)``.

    It is averaged over components.

    Args:
        f_phi: the images as the teacher denoises them, ``(b, ...)``.
        f_psi: the images as the student score denoises them, its parameters held constant.
        x_g: the generated images themselves.
        alpha: weight of L1; 0 is L2 alone.
        normalise: divide each image's loss by its mean of ``|x_g - f_phi|``, held constant and at least 1e-5, which
            brings all noise levels to one scale (as the official code does).

    >>> generator_loss(torch.ones(1, 2), torch.zeros(1, 2), -torch.ones(1, 2), 0.5)
    tensor([0.7500])
    """
    gap = f_phi - f_psi
    loss = (gap * ((f_phi - x_g) - alpha * gap)).flatten(1).mean(1)
    if not normalise:
        return loss
    return loss / (x_g - f_phi).detach().abs().flatten(1).mean(1).clamp_min(1e-5)


class _Borrowed:
    """Holds a module without registering it: it is not part of the state, and copies of the owner share it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, object]) -> "_Borrowed":
        return self


def _check_teacher(teacher: Denoising, model: nn.Module, config: SiDConfig) -> None:
    if not isinstance(teacher, Denoising):
        raise TypeError(f"teacher must be a run with the objective Denoising, got {type(teacher).__name__}")
    if teacher.config != config.denoising:
        raise ValueError(f"denoising must be the teacher's own, {teacher.config}, got {config.denoising}")
    shapes = [{name: tuple(p.shape) for name, p in net.state_dict().items()} for net in (teacher.model, model)]
    if shapes[0] != shapes[1]:
        other = next(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        there, here = (shape.get(other) for shape in shapes)
        raise ValueError(f"model must have the teacher's shape; {other} is {there} there and {here} here")
