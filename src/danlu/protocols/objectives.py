"""What is minimised, measured and drawn from."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from danlu.protocols.config import Config
from danlu.protocols.data import Batch

__all__ = ["Denoises", "Generator", "Measure", "Objective", "ObjectiveConfig", "Paced", "Scored"]


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation, as what adds up: sums over batches, which are added over processes too.

    Attributes:
        total: what is summed, float64 of any shape.
        denominator: what it is divided by, summed alike. All zero: there was nothing to measure.
        finish: from both sums to the number, or to None where they do not determine one.

    >>> Measure(torch.tensor(6.0), torch.tensor(4.0)).value()
    1.5
    """

    total: Tensor
    denominator: Tensor
    finish: Callable[[Tensor, Tensor], Tensor | None] = torch.div

    def value(self) -> float | None:
        """The number, or None where nothing was measured."""
        found = self.finish(self.total, self.denominator) if bool(self.denominator.any()) else None
        return None if found is None else float(found)


class Objective(Protocol):
    """What is minimised: a ``torch.nn.Module`` around the model that turns a batch into a summed loss.

    The trainer divides the gradient by the sum of :meth:`denominator` over all micro-batches and processes: the step is
    that of one large batch, however it is divided.

    Attributes:
        unit: what the loss is divided by, in the plural, for the progress line: "tokens", "images".
        labels: how the progress line calls the numbers of :meth:`metrics` and :meth:`evaluate` that it shows.

    >>> class Regression(nn.Module):
    ...     unit = "rows"
    ...     labels: Mapping[str, str] = {}
    ...     def __init__(self, model: nn.Module) -> None:
    ...         super().__init__()
    ...         self.model = model
    ...     def forward(self, batch: Batch) -> Tensor:
    ...         return (self.model(batch["x"]) - batch["y"]).square().sum()
    ...     def denominator(self, batch: Batch) -> Tensor:
    ...         return torch.tensor(len(batch["x"]))
    ...     def metrics(self) -> Mapping[str, float]:
    ...         return {}
    ...     def evaluate(self, batches: Iterable[Batch]) -> Mapping[str, Measure]:
    ...         loss, rows = torch.zeros(2, dtype=torch.float64)
    ...         for batch in batches:
    ...             loss, rows = loss + self(batch), rows + self.denominator(batch)
    ...         return {"val_loss": Measure(loss, rows)}
    >>> objective: Objective = Regression(nn.Linear(3, 1))
    """

    unit: str
    labels: Mapping[str, str]

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return what is trained, the model's parameters among them (``torch.nn.Module`` has it)."""

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss summed over the batch, a scalar, float32 or wider."""

    def denominator(self, batch: Batch) -> Tensor:
        """Return what the sum is to be divided by (tokens with a target, images), an integer scalar."""

    def metrics(self) -> Mapping[str, float]:
        """Return what else there is to report of the last step, by name."""

    def evaluate(self, batches: Iterable[Batch]) -> Mapping[str, Measure]:
        """Measure ``batches``, once through: always the same names, ``val_loss`` among them.

        The caller has switched the module to evaluation mode and gradients off, adds the sums over processes and
        leaves out what has nothing to measure (:func:`danlu.objectives.evaluate`).
        """


@runtime_checkable
class Paced(Protocol):
    """An objective that changes over a run, and so has to know how far one of unknown length has come."""

    def pace(self, share: float) -> None:
        """Take note that ``share`` of the run is over; called after a step where the run's length is not given."""


@runtime_checkable
class Scored(Protocol):
    """An objective some of whose measures are better the higher they are; of all others less is better.

    Attributes:
        scores: the names of these measures.
    """

    scores: Collection[str]


class ObjectiveConfig(Config, Protocol):
    """Configuration of an objective."""

    def build(self, model: Any, *, data: Any = None, batches: int | None = None, **others: Any) -> Any:
        """Make the objective around ``model``; it fits :class:`Objective` and is a ``torch.nn.Module``.

        Args:
            model: what ``ModelConfig.build`` made.
            data: the opened :class:`Data`; None to sample only.
            batches: training batches that there will be at most on each process; None to sample only.
            others: among them ``pretrained``, a function from a :class:`danlu.config.Pretrained` to the trained
                objective of that run.

        Raises:
            ValueError, TypeError: the model or the data do not fit.
        """


@runtime_checkable
class Generator(Protocol):
    """An objective that can draw images: what ``danlu sample`` needs.

    Attributes:
        sampling_steps: steps taken where none are asked for.
    """

    sampling_steps: int

    def sample(
        self,
        shape: tuple[int, ...],
        *,
        steps: int,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
        guidance: float | None = None,
        upsample: int = 1,
        trajectory: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draw images ``shape`` ``(n, c, h, w)`` from -1 to 1, or all states ``(steps + 1, n, c, h, w)``.

        Args:
            shape: of the images.
            steps: evaluations of the network, or steps of the sampler.
            generator: on the model's device.
            labels: classes, int64 ``(n,)``; None draws without.
            guidance: scale of guidance to the class.
            upsample: times that ``shape`` is larger than the images trained on.
            trajectory: return all states, the images last.
            progress: called with the steps done and their number.

        Raises:
            ValueError: an argument is out of range, or the objective has no use for it.
        """


@runtime_checkable
class SwapsWeights(Protocol):
    """An objective that calls a network with other weights than its own, as ``torch.func.functional_call`` does.

    Its networks cannot be gathered, nor run again, block by block: the weights would be the network's own.

    Attributes:
        swaps_weights: True.
    """

    swaps_weights: ClassVar[bool]


@runtime_checkable
class Denoises(Protocol):
    """An objective whose model finds images in noise: what ``danlu encode`` needs."""

    @property
    def schedule(self) -> Any:
        """The noise process, a schedule of :mod:`danlu.diffusion`."""

    def denoiser(self, shape: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the model as a function ``(x, t) -> x0`` of images ``shape`` ``(n, c, h, w)``."""
