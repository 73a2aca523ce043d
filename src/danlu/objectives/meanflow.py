r"""MeanFlow: learn the average velocity, so that one step leads from noise to data.

With the velocity v of flow matching, ``u(x_t, t, r) = 1/(t - r) \int_r^t v dtau`` along the flow takes x_t to x_r in
one step: ``x_r = x_t - (t - r) u``. Differentiating ``(t - r) u`` along the flow gives the identity used in training,

    u = v - (t - r) du/dt,      du/dt = the derivative of u(x, t, r) along (v, 1, 0),

which forward-mode differentiation evaluates together with u. Where r = t it says ``u = v``: plain flow matching.
Source: Geng et al., arXiv:2505.13447; the three objectives: kexue.fm 10958; networks whose output is an image: Lu et
al., arXiv:2601.22158.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from danlu._draws import derived, normal
from danlu._validate import integer, literals, number, positive
from danlu.diffusion import LogitNormalTimes, Progress, TimesConfig, average_velocity, prior
from danlu.objectives._images import ImageObjective, check_sampling, class_labels, mean_square
from danlu.objectives.draws import keys_of
from danlu.objectives.flow_matching import FLOW
from danlu.protocols import Batch

__all__ = ["MeanFlow", "MeanFlowConfig", "total_derivative"]

_SHORTEST = 0.05  # at smaller times dividing by t would give errors of the image too much weight

_log = logging.getLogger(__name__)

AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class MeanFlowConfig:
    """How the average velocity is learned.

    Attributes:
        prediction: what the network predicts. ``velocity``: u itself. ``x0``: the image in which a straight step would
            end, ``u = (x - output) / max(t, 0.05)``; one step from noise gives the output.
        form: ``meanflow``, the paper's: the derivative is taken along ``eps - x_0`` and held constant. ``marginal``
            takes it along the model's own velocity ``u(x, t, t)`` and holds it constant (one more evaluation).
            ``full`` does the same but differentiates through it: second derivatives, about twice the time.
        share: part of the images with r != t, spread evenly over the run; the rest is flow matching. The derivative is
            computed for this part only (rounded up to whole images of a batch).
        flow_share: part of the training, at its start, that is flow matching alone. The derivative of an untrained
            network is noise: learning velocities first is cheaper, and better in a short run.
        times: distribution from which t and r are drawn; the larger is t, also where r is then set to t. The default
            rarely draws t near 1 with r near 0, where one step starts: in low dimensions use UniformTimes.
        power: p of the adaptive weight ``1 / (loss + offset)^p`` of each image; 0 for none.
        offset: see power.
        omega: weight of the conditional velocity in the guided velocity that is learned.
        kappa: weight of the model's own conditional velocity in it. The two act as a guidance scale of
            ``omega / (1 - kappa)``, and sampling needs no further guidance. 1 and 0: no guidance.
        guidance_from, guidance_to: times between which guidance is learned.
        label_dropout: share of images whose class label is hidden from the network; they learn the plain velocity.
    """

    prediction: Literal["velocity", "x0"] = "velocity"
    form: Literal["meanflow", "marginal", "full"] = "meanflow"
    share: float = 0.25
    flow_share: float = 0.0
    times: TimesConfig = field(default_factory=LogitNormalTimes)
    power: float = 1.0
    offset: float = 1e-2
    omega: float = 1.0
    kappa: float = 0.0
    guidance_from: float = 0.0
    guidance_to: float = 1.0
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        literals(self)
        number("share", self.share, low=0, high=1)
        number("flow_share", self.flow_share, low=0, high=1)
        number("power", self.power, low=0)
        positive("offset", self.offset)
        positive("omega", self.omega)
        number("kappa", self.kappa, low=0, high=1, high_open=True)
        number("guidance_from", self.guidance_from, low=0, high=1)
        number("guidance_to", self.guidance_to, low=self.guidance_from, high=1)
        number("label_dropout", self.label_dropout, low=0, high=1)

    def build(self, model: nn.Module, *, batches: int | None = None, **others: Any) -> "MeanFlow":
        """Make the objective around a network of two times, to be trained on ``batches`` batches (None: to sample)."""
        return MeanFlow(model, self, batches)

    @property
    def guided(self) -> bool:
        """Whether a guided velocity is learned."""
        return (self.omega, self.kappa) != (1, 0)


class _Draw(NamedTuple):
    """Noisy images with their times, class labels and velocities; only among the first ``apart`` rows is r != t."""

    x: Tensor
    t: Tensor
    r: Tensor
    classes: Tensor | None
    velocity: Tensor
    apart: int


class MeanFlow(ImageObjective):
    """The MeanFlow objective, summed over images.

    The loss of an image is the sum of squares of ``u - target`` over its components, times the adaptive weight. With
    ``power = 1`` every image's loss is near 1 whatever the error, by design: watch ``velocity_mse`` (flow matching's
    error, where r = t) and ``average_mse`` (where r != t), which are unweighted and averaged over components.

    The forward-mode derivative is evaluated only for the rows with r != t, where it has an effect; for a network that
    treats images independently the result equals that of the full batch.

    Args:
        model: a network ``net(x, t, classes, r)``, held as ``self.model``; it must support forward-mode
        differentiation,
            which fused attention kernels do not. ``num_classes`` as in :class:`danlu.objectives.FlowMatching`.
        config: see :class:`MeanFlowConfig`.
        batches: total number of training batches, to which ``config.flow_share`` refers.
    """

    sampling_steps = 1

    def __init__(self, model: nn.Module, config: MeanFlowConfig | None = None, batches: int | None = None) -> None:
        super().__init__(model)
        self.config = MeanFlowConfig() if config is None else config
        if self.config.guided and not int(getattr(model, "num_classes", 0)):
            raise ValueError("omega and kappa ask for guidance, and the model has no classes")
        self._share = Fraction(self.config.share).limit_denominator(1 << 16).as_integer_ratio()
        self._last: dict[str, Tensor] = {}
        if batches is not None:
            integer("batches", batches)
        self.batches = batches
        self.flow_left: Tensor  # batches of flow matching still to come; saved only if flow_share is used
        left = torch.tensor(round(self.config.flow_share * (batches or 0)))
        self.register_buffer("flow_left", left, persistent=self.config.flow_share > 0)
        self._left: int | None = None  # the same, read once: a step must not wait for the device to tell it
        self.register_load_state_dict_post_hook(_unread)

    def forward(self, batch: Batch) -> Tensor:
        """Return the weighted loss summed over images, float32.

        Raises:
            ValueError: in training, ``config.flow_share`` is above 0 and ``batches`` was not given.
        """
        share = self._share
        if self.training and self.config.flow_share:
            if self.batches is None:
                raise ValueError(
                    f"flow_share {self.config.flow_share} is a share of batches, which MeanFlow was not given"
                )
            if not self.flow_left.is_meta:  # there only sizes count, and those of the later part are the larger
                if self._left is None:
                    self._left = int(self.flow_left)
                if self._left > 0:
                    share = (0, 1)
                    self._left -= 1
                    self.flow_left -= 1
        # So many rows that follow one another have r != t at most: nobody has to wait for the device to tell.
        most = -(-len(batch["images"]) * share[0] // share[1])
        draw = self._draw(batch, keys_of(batch, batch["images"]), share, most=most)
        error = self._error(draw)
        self._last = {name: value.detach() for name, value in _errors(error, draw).items()}
        square = mean_square(error) * error[0].numel()
        if self.config.power:
            square = square / (square.detach() + self.config.offset) ** self.config.power
        return square.sum()

    def pace(self, share: float) -> None:
        """End the flow matching when its share of a run of unknown length is over."""
        if share >= self.config.flow_share:
            self.flow_left.zero_()
            self._left = 0

    def average(self, x: Tensor, t: Tensor, classes: Tensor | None, r: Tensor) -> Tensor:
        """Return the network's average velocity ``u(x, t, r)`` of images ``(b, c, h, w)`` and times ``(b,)``."""
        output: Tensor = self.model(x, t, classes, r)
        if self.config.prediction == "velocity":
            return output
        return (x - output) / t.clamp_min(_SHORTEST).view(-1, 1, 1, 1)

    def _draw(self, batch: Batch, keys: Tensor, share: tuple[int, int], most: int | None = None) -> _Draw:
        """Draw times and noise; ``most`` rows with r != t, or as many as there are."""
        x0, config, labels = batch["images"], self.config, batch.get("labels")
        size, chosen = len(x0), _spread(keys, share)
        apart = int(chosen.sum()) if most is None else most
        order = torch.argsort(~chosen, stable=True)  # those with r != t first
        x0, keys = x0[order], keys[order]
        chosen = chosen[order] & (torch.arange(size, device=x0.device) < apart)
        labels = None if labels is None else labels.to(x0.device)[order]
        noise = normal(keys, "noise", *x0.shape[1:], dtype=x0.dtype)
        one, other = (
            config.times.draw(size, FLOW, device=x0.device, keys=some) for some in (keys, derived(keys, "other time"))
        )
        t = torch.maximum(one, other).to(x0.dtype)
        r = torch.where(chosen, torch.minimum(one, other).to(x0.dtype), t)
        x, velocity = FLOW.noised(x0, noise, t), noise - x0
        classes = class_labels(self.model, labels, size, dropout=config.label_dropout, keys=keys)
        if config.guided and classes is not None:
            velocity = self._guided(x, t, classes, velocity)
        return _Draw(x, t, r, classes, velocity, apart)

    @torch.no_grad()
    def _guided(self, x: Tensor, t: Tensor, classes: Tensor, velocity: Tensor) -> Tensor:
        """Return ``omega v + kappa u(x, t, t | c) + (1 - omega - kappa) u(x, t, t)``; v where guidance is off.

        Guidance is off for images without a class and at times outside guidance_from to guidance_to.
        """
        config, none = self.config, int(self.model.num_classes)  # type: ignore[arg-type]
        mixed = config.omega * velocity
        if config.kappa:
            mixed = mixed + config.kappa * self.average(x, t, classes, t)
        without = 1 - config.omega - config.kappa
        if without:
            mixed = mixed + without * self.average(x, t, torch.full_like(classes, none), t)
        applies = (classes != none) & (t >= config.guidance_from) & (t <= config.guidance_to)
        return torch.where(applies.view(-1, 1, 1, 1), mixed, velocity)

    def _error(self, draw: _Draw) -> Tensor:
        """Return u minus its target, ``(b, c, h, w)``: with the derivative where r != t, flow matching where r = t."""
        x, t, r, classes, velocity, apart = draw
        if not apart:
            return self.average(x, t, classes, r) - velocity
        rows = slice(apart)
        some = None if classes is None else classes[rows]
        x_r, t_r, r_r, tangent = x[rows], t[rows], r[rows], velocity[rows]
        form = self.config.form
        if form != "meanflow":
            with torch.set_grad_enabled(form == "full" and torch.is_grad_enabled()):
                tangent = self.average(x_r, t_r, some, t_r)

        def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return self.average(x, t, some, r)

        if form == "full":
            near, slope = total_derivative(u, x_r, t_r, r_r, tangent)
            far = self.average(x[apart:], t[apart:], None if classes is None else classes[apart:], r[apart:])
            value = torch.cat([near, far])
        else:
            with torch.no_grad():
                _, slope = total_derivative(u, x_r, t_r, r_r, tangent)
            value = self.average(x, t, classes, r)
        correction = (t_r - r_r).view(-1, 1, 1, 1).to(slope.dtype) * slope
        return torch.cat([(value - velocity)[:apart] + correction, (value - velocity)[apart:]])

    def _loss(self, batch: Batch, keys: Tensor) -> Tensor:
        """Return the validation loss: the mean squared error per component, without the adaptive weight."""
        return mean_square(self._error(self._draw(batch, keys, self._share))).sum()

    def metrics(self) -> dict[str, float]:
        """Return the unweighted errors of the last batch: ``velocity_mse`` (r = t) and ``average_mse`` (r != t)."""
        found = {name: pair.tolist() for name, pair in self._last.items()}
        return {name: total / count for name, (total, count) in found.items() if count}

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
        """Draw images in ``steps`` equal steps from t = 1 to 0; arguments as :meth:`FlowMatching.sample`.

        Raises:
            ValueError: as there, or if ``guidance`` is given: it is learned in training, by ``omega`` and ``kappa``.
        """
        if guidance not in (None, 1):
            raise ValueError("guidance is learned in training by MeanFlow (omega and kappa); sampling takes none")
        device, classes = check_sampling(self.model, tuple(shape), labels, None, upsample=upsample)
        integer("steps", steps)
        if self.flow_left > 0:
            _log.warning(
                "this network was to be trained on %d batches more of flow matching (objective.flow_share is %g): "
                "it has not yet learned to take large steps",
                int(self.flow_left),
                self.config.flow_share,
            )
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        x = prior(shape, FLOW, generator=generator, device=device)
        return average_velocity(
            lambda x, t, r: self.average(x, t, classes, r), x, times, trajectory=trajectory, progress=progress
        )


def total_derivative(u: AverageVelocity, x: Tensor, t: Tensor, r: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``u(x, t, r)`` and its derivative along the flow: x moves with ``velocity``, t with 1, r stays.

    Args:
        u: a function that forward-mode differentiation can follow.
        x: ``(b, ...)``.
        t, r: ``(b,)``.
        velocity: like x.

    >>> u = lambda x, t, r: x * t - r
    >>> one = torch.ones(1)
    >>> total_derivative(u, 3 * one, 2 * one, one, 5 * one)
    (tensor([5.]), tensor([13.]))
    """
    both = torch.func.jvp(u, (x, t, r), (velocity, torch.ones_like(t), torch.zeros_like(r)))
    return both[0], both[1]


def _unread(objective: nn.Module, _: object) -> None:
    objective._left = None  # type: ignore[assignment]


def _spread(keys: Tensor, share: tuple[int, int]) -> Tensor:
    """Return which rows belong to a share ``(part, whole)`` of all, spread evenly over their numbers, ``(b,)``.

    Row p does where ``floor((p + 1) share) > floor(p share)``: of any rows that follow one another, wherever batches
    and processes divide them, the share is the right one to less than a row. In integers, so that it is exact.
    """
    part, whole = share
    return keys % whole * part % whole >= whole - part


def _errors(error: Tensor, draw: _Draw) -> dict[str, Tensor]:
    """Return sum and number of the squares of both kinds of rows, ``(2,)`` each."""
    square, differs = mean_square(error), (draw.r != draw.t).to(torch.float32)
    parts = {"average_mse": differs, "velocity_mse": 1 - differs}
    return {name: torch.stack([(square * part).sum(), part.sum().to(square)]) for name, part in parts.items()}
