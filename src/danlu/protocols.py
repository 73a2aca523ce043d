"""The contracts between the parts of a run, typed: what a component must have for the rest to work with it.

Every component that a recipe can choose is made by a frozen, keyword-only dataclass beside it, ``XConfig`` beside
``X``, with one method: ``build`` (data: ``open``). Runtime arguments are passed by keyword; a component takes those
that it needs and ``**others`` for the rest, so that a later release can pass more. Nothing is looked up by the name of
a class or of an argument.

These are protocols: a class fits by having the methods, it need not inherit from anything here. Each shows its smallest
working example.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "Batch",
    "CountsOperations",
    "CountsParameters",
    "Data",
    "DataConfig",
    "Generator",
    "Loader",
    "Measure",
    "Model",
    "ModelConfig",
    "Objective",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Record",
    "Reporter",
    "ScheduleConfig",
    "TokenData",
]

Batch: TypeAlias = Mapping[str, Tensor]
"""What a loader yields and an objective takes: tensors by name, the first dimension counting examples."""

Record: TypeAlias = Mapping[str, Any]
"""The numbers of one logged step: ``step`` and what the trainer and the objective measured, all plain values."""


# ------------------------------------------------------------------------------------------------------- data


class Loader(Protocol):
    """An endless stream of batches whose position is a small state.

    The same position gives the same batches in every process: what is drawn depends on the seed and the position
    alone, so that a resumed run continues with the batch that would have come next.

    >>> class Zeros:
    ...     position = 0
    ...     def __next__(self) -> Batch:
    ...         self.position += 1
    ...         return {"x": torch.zeros(2, 3)}
    ...     def state_dict(self) -> Mapping[str, Any]:
    ...         return {"position": self.position}
    ...     def load_state_dict(self, state: Mapping[str, Any]) -> None:
    ...         self.position = state["position"]
    >>> loader: Loader = Zeros()
    >>> next(loader)["x"].shape, loader.state_dict()
    (torch.Size([2, 3]), {'position': 1})
    """

    def __next__(self) -> Batch:
        """Return the next batch: this process's rows of it."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the position, in plain values."""

    def load_state_dict(self, state: Any) -> None:
        """Go to a position.

        Raises:
            ValueError: the position is one in other data.
        """


class Data(Protocol):
    """Data made ready for training; what ``DataConfig.open`` returns.

    >>> from collections.abc import Iterator
    >>> class Nothing:
    ...     train: Loader
    ...     manifest: Mapping[str, Any] = {"source": "nothing at all"}
    ...     sizes: Mapping[str, int] = {}
    ...     def validation(self, batches: int | None = None) -> Iterator[Batch]:
    ...         yield {"x": torch.zeros(2, 3)}
    >>> len(list(Nothing().validation()))
    1
    """

    @property
    def train(self) -> Loader:
        """Training batches."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the data are, in JSON types.

        Known keys, all optional: ``source`` (one line for people), ``sha256`` (of the content: a run is resumed on the
        same content only), ``bytes``, ``documents``, ``train_tokens`` or ``train_images`` (how many there are in one
        pass), ``warnings`` (sentences), ``classes`` (names).
        """

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes that a network of these data must have, by the name of the field of its configuration.

        They replace those in the model's configuration; a field that is 0 there is a choice and stays.
        """

    def validation(self, batches: int | None = None) -> Iterable[Batch]:
        """Go once through the held-out data, or through ``batches`` batches spread over them: this process's share."""


@runtime_checkable
class TokenData(Data, Protocol):
    """Data of tokens, which know how much text a token stands for."""

    @property
    def byte_lengths(self) -> Tensor | None:
        """int64 ``(vocab,)``: bytes of text that each token stands for; None where tokens are not text."""


class DataConfig(Protocol):
    """Configuration of a data set."""

    def open(self, *, seed: int, rank: int, world: int, **others: Any) -> Data:
        """Open the data for process ``rank`` of ``world``, in the order that ``seed`` selects.

        Raises:
            ValueError, OSError, ImportError: the data cannot be read.
        """


# ------------------------------------------------------------------------------------------------ models, optimizers


class Model(Protocol):
    """A network: a ``torch.nn.Module`` with two conventions.

    ``compute_dtype`` is the dtype of its activations, set after it was built; None stands for that of the weights. A
    module that ignores it computes in the dtype of its weights. A model that counts its operations and parameters
    (:class:`CountsOperations`, :class:`CountsParameters`) is told about in more detail before training.

    >>> class Linear(nn.Linear):
    ...     compute_dtype: torch.dtype | None = None
    >>> model: Model = Linear(3, 2)
    """

    compute_dtype: torch.dtype | None


@runtime_checkable
class CountsOperations(Protocol):
    """A model that knows the work of training it."""

    def training_flops(self, length: int | None = None) -> float:
        """Floating-point operations of a forward and a backward pass for one of what the loss is divided by.

        Args:
            length: tokens of a sequence, for networks of sequences.
        """


@runtime_checkable
class CountsParameters(Protocol):
    """A model that uses a part of its parameters at a time."""

    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, and those that one token uses."""


class ModelConfig(Protocol):
    """Configuration of a network."""

    def build(self, **others: Any) -> nn.Module:
        """Make the network with fresh weights drawn from torch's default generator; it fits :class:`Model`.

        Raises:
            ValueError, TypeError: sizes that do not fit together, naming the field.
        """


class OptimizerConfig(Protocol):
    """Configuration of an optimizer.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, kw_only=True)
    ... class SGDConfig:
    ...     lr: float = 0.1
    ...     def build(self, model: nn.Module, **others: Any) -> Optimizer:
    ...         return torch.optim.SGD(model.parameters(), lr=self.lr)
    >>> SGDConfig(lr=0.5).build(nn.Linear(3, 2), process_group=None).param_groups[0]["lr"]
    0.5
    """

    def build(self, model: nn.Module, *, process_group: Any = None, **others: Any) -> Optimizer:
        """Make one optimizer that updates every parameter of ``model`` that requires a gradient exactly once.

        Args:
            model: whose parameters are updated.
            process_group: processes that hold replicas of the model, among which work may be shared; None for none.

        Raises:
            ValueError: a parameter has no rule, or several; it is named.
        """


class ScheduleConfig(Protocol):
    """Configuration of a learning rate over time.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Linear:
    ...     def factor(self, step: int, total: int) -> float:
    ...         return 1 - step / total
    >>> Linear().factor(5, 10)
    0.5
    """

    def factor(self, step: int, total: int) -> float:
        """Factor on every group's learning rate at ``step`` (from 0) of ``total`` steps."""


# ------------------------------------------------------------------------------------------------------- objectives


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation, as what adds up: sums over batches, which are added over processes too.

    Attributes:
        total: what is summed, float64 of any shape.
        denominator: what it is divided by, summed alike. All zero: there was nothing to measure.
        finish: from both sums to the number.

    >>> Measure(torch.tensor(6.0), torch.tensor(4.0)).value()
    1.5
    """

    total: Tensor
    denominator: Tensor
    finish: Callable[[Tensor, Tensor], Tensor] = torch.div

    def value(self) -> float | None:
        """The number, or None where nothing was measured."""
        return float(self.finish(self.total, self.denominator)) if bool(self.denominator.any()) else None


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

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss summed over the batch, a scalar, float32 or wider."""

    def denominator(self, batch: Batch) -> Tensor:
        """Return what the sum is to be divided by (tokens with a target, images), an integer scalar."""

    def metrics(self) -> Mapping[str, float]:
        """Return what else there is to report of the last step, by name."""

    def evaluate(self, batches: Iterable[Batch]) -> Mapping[str, Measure]:
        """Measure ``batches``, once through: always the same names, ``val_loss`` among them.

        The caller has switched the module to evaluation mode and gradients off, adds the sums over processes and
        leaves out what has nothing to measure (:func:`danlu.train.evaluate.evaluate`).
        """


class ObjectiveConfig(Protocol):
    """Configuration of an objective."""

    def build(self, model: Any, *, data: Any = None, batches: int | None = None, **others: Any) -> Any:
        """Make the objective around ``model``; it fits :class:`Objective` and is a ``torch.nn.Module``.

        Args:
            model: what ``ModelConfig.build`` made.
            data: the opened :class:`Data`; None to sample only.
            batches: training batches that there will be on each process; None to sample only.
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


# ------------------------------------------------------------------------------------------------------- reporting


class Reporter(Protocol):
    """Receives the record of every logged step in order, then is closed.

    >>> class Losses(list[float]):
    ...     def __call__(self, record: Record) -> None:
    ...         self.append(record["loss"])
    ...     def close(self) -> None:
    ...         pass
    >>> reporter: Reporter = Losses()
    >>> reporter({"step": 1, "loss": 2.5})
    """

    def __call__(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Finish: nothing is reported afterwards."""
