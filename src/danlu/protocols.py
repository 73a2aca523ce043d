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
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "IGNORE",
    "ActivationConfig",
    "BalanceConfig",
    "Batch",
    "Cache",
    "Config",
    "Context",
    "CountsOperations",
    "CountsParameters",
    "Data",
    "DataConfig",
    "Denoises",
    "ExpectsSizes",
    "Generator",
    "KeepsFiles",
    "Loader",
    "Measure",
    "Mixer",
    "MixerConfig",
    "Model",
    "ModelConfig",
    "Objective",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Paced",
    "Record",
    "Reporter",
    "ScheduleConfig",
    "SettlesLate",
    "TokenData",
]

Batch: TypeAlias = Mapping[str, Tensor]
"""What a loader yields and an objective takes: tensors by name, the first dimension counting examples."""

IGNORE = -100
"""Target of a token that has none: it is part of no loss (the number is torch's own ``ignore_index``)."""

Record: TypeAlias = Mapping[str, Any]
"""The numbers of one logged step: ``step`` and what the trainer and the objective measured, all plain values."""


class Config(Protocol):
    """What all configurations have in common: they are dataclasses, frozen and keyword-only by convention."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


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


@runtime_checkable
class KeepsFiles(Protocol):
    """Data of which a run keeps files, such as a tokenizer."""

    def save(self, folder: Path) -> None:
        """Write the files that reading the run's output needs into its folder."""


class DataConfig(Config, Protocol):
    """Configuration of a data set."""

    def open(self, *, seed: int, rank: int, world: int, **others: Any) -> Data:
        """Open the data for process ``rank`` of ``world``, in the order that ``seed`` selects.

        Raises:
            ValueError, OSError, ImportError: the data cannot be read.
        """


@runtime_checkable
class ExpectsSizes(Protocol):
    """A configuration of data that knows before they are read what some of their ``sizes`` are going to be."""

    def expected_sizes(self) -> Mapping[str, int]:
        """Return the sizes known so far, by the name of the field of the model's configuration."""


# ------------------------------------------------------------------------------------------------------------ layers


class Cache(Protocol):
    """What one layer keeps of the tokens that it has read. Only ``length``, their number, is read from outside."""

    length: int


C = TypeVar("C", bound=Cache)


@dataclass(frozen=True, kw_only=True)
class Context(Generic[C]):
    """What surrounds the tokens that a mixer is given: made once for each layer and forward pass.

    :func:`danlu.nn.attention.context.layer_contexts` makes those of a whole model; for one layer alone give the fields
    that it needs.

    Attributes:
        rope: cosines and sines of the tokens' positions (:mod:`danlu.nn.rotary`), each ``(time, rope_dim)`` or
            ``(batch, time, rope_dim)``; a layer that rotates nothing needs none.
        mask: True where a query may look, broadcastable to ``(batch, heads, time, keys)``, in place of the layer's own
            mask; None: the layer's own.
        documents: document number of each token, int64 ``(batch, time)``; None: each row is one document. Where a
            layer names its mask, documents are part of ``mask`` already.
        positions: the coordinates that ``rope`` was made of, ``(time, axes)`` or ``(batch, time, axes)``; None: tokens
            are counted from the first one in the cache.
        prefix: number of first tokens that all tokens see, for a layer with the mask "prefix"; with a cache, of its
            first call.
        cache: what earlier calls of this layer stored; the layer appends the new tokens to it.

    >>> Context(prefix=3).tables(0)[0].shape
    torch.Size([0])
    """

    rope: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None
    prefix: int | None = None
    cache: C | None = None

    def tables(self, rope_dim: int) -> tuple[Tensor, Tensor]:
        """Return ``rope``, for a layer that rotates ``rope_dim`` coordinates of each head.

        Raises:
            ValueError: there are none, or they are of another size.
        """
        if self.rope is None:
            if rope_dim:
                raise ValueError(f"rope must hold cosines and sines of {rope_dim} coordinates for this layer, got None")
            return _NO_TABLES
        if self.rope[0].shape[-1] != rope_dim:
            raise ValueError(f"rope must be tables of {rope_dim} coordinates, got {self.rope[0].shape[-1]}")
        return self.rope


_NO_TABLES = (torch.empty(0), torch.empty(0))


class Mixer(Protocol):
    """What mixes the tokens of a block: attention, a state space, or a layer of one's own; a ``torch.nn.Module``.

    Attributes:
        rope_dim: coordinates of each head that positions rotate: the size of the tables in ``context.rope``; 0: none.
        mask: which tokens a token sees, one of ``danlu.nn.attention.masks.MASKS``; the model then combines documents
            and it into ``context.mask``. None: the layer tells documents apart by itself, from ``context.documents``.
        num_heads: heads that the mask "mixed-heads" divides; 1 for a layer without heads.

    >>> class Mean(nn.Module):
    ...     rope_dim, mask, num_heads = 0, None, 1
    ...     def forward(self, x: Tensor, context: Context[Any]) -> Tensor:
    ...         return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
    ...     def flops_per_token(self, length: int) -> float:
    ...         return 0.0
    ...     def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> Cache:
    ...         raise NotImplementedError
    >>> mixer: Mixer = Mean()
    >>> mixer(torch.ones(1, 3, 2), Context()).sum()
    tensor(6.)
    """

    @property
    def rope_dim(self) -> int:
        """Coordinates that positions rotate."""

    @property
    def mask(self) -> str | None:
        """Name of the layer's mask."""

    @property
    def num_heads(self) -> int:
        """Number of heads."""

    def __call__(self, x_btd: Tensor, context: Context[Any], /) -> Tensor:
        """Map ``(batch, time, dim)`` to the same."""

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> Cache:
        """Make an empty cache for ``batch`` sequences of up to ``capacity`` tokens."""

    def flops_per_token(self, length: int) -> float:
        """Operations of a forward pass per token at ``length`` tokens, beside those of two per parameter."""


class MixerConfig(Protocol):
    """Configuration of a mixer.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, kw_only=True)
    ... class LinearConfig:
    ...     def build(self, dim: int, *, out_std: float, **others: Any) -> nn.Module:
    ...         layer = nn.Linear(dim, dim)
    ...         nn.init.normal_(layer.weight, std=out_std)
    ...         return layer
    >>> LinearConfig().build(8, out_std=0.1, index=0).weight.shape
    torch.Size([8, 8])
    """

    def build(self, dim: int, *, out_std: float, **others: Any) -> Any:
        """Make the layer; it fits :class:`Mixer` and is a ``torch.nn.Module``.

        Args:
            dim: model size.
            out_std: standard deviation of an output projection that reads ``dim`` features; one that reads ``inner``
                features multiplies it by ``sqrt(dim / inner)``.
            others: among them ``index``, the number of the block (from 0), for layers that alternate.

        Raises:
            ValueError, TypeError: sizes that do not fit together, naming the field.
        """


class ActivationConfig(Protocol):
    """Configuration of the activation in the gate of a feed-forward layer."""

    def build(self, **others: Any) -> nn.Module:
        """Make the activation: a module from a tensor of any shape to one of the same."""


class BalanceConfig(Protocol):
    """Configuration of how a `danlu.nn.MoE` layer keeps the load of its experts even.

    A kind of balancing of one's own inherits from this class and overrides what differs: all has a default.

    Attributes:
        thresholds: an expert works on every token whose biased score is above zero, rather than on those that it is
            among the ``top_k`` of.
        auxiliary: :meth:`load_gradient` is added to the gradient of the scores.
        freeze_after: updates after which the biases stay as they are; None: never.
        scheduled: steps of the biases are multiplied by the learning rate's own factor.

    >>> class Upwards(BalanceConfig):
    ...     def step(self, counts_e: Tensor, tokens: Tensor, budget: float) -> Tensor:
    ...         return 1e-3 * (counts_e == 0)
    >>> Upwards().step(torch.tensor([3.0, 0.0]), torch.tensor(3.0), 1.0), Upwards().start(2, 1, "sigmoid")
    (tensor([0.0000, 0.0010]), 0.0)
    """

    thresholds: ClassVar[bool] = False
    auxiliary: ClassVar[bool] = False

    @property
    def freeze_after(self) -> int | None:
        """Updates of the biases; None: without end."""
        return None

    @property
    def scheduled(self) -> bool:
        """Whether the learning rate's factor is the biases' too."""
        return False

    def check(self, num_experts: int, top_k: int, *, gate: str, select_by: str, num_groups: int) -> None:
        """Raise ValueError unless this balancing goes with a layer of these options of `danlu.nn.MoEConfig`."""
        return None

    def start(self, num_experts: int, top_k: int, gate: str) -> float:
        """Return what every bias is at the start of training."""
        return 0.0

    def step(self, counts_e: Tensor, tokens: Tensor, budget: float) -> Tensor:
        """Return the change of the biases after an optimizer step, ``(experts,)``.

        Args:
            counts_e: choices that fell on each expert, ``(experts,)``.
            tokens: number of tokens that chose, ``()``.
            budget: experts that a token is to use in the mean, ``top_k``.
        """
        return torch.zeros_like(counts_e)

    def load_gradient(self, counts_e: Tensor) -> Tensor:
        """Return the derivative of an auxiliary loss by the load, ``(experts,)``, asked for where ``auxiliary``."""
        return torch.zeros_like(counts_e)


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


class ModelConfig(Config, Protocol):
    """Configuration of a network."""

    def build(self, **others: Any) -> nn.Module:
        """Make the network with fresh weights drawn from torch's default generator; it fits :class:`Model`.

        Raises:
            ValueError, TypeError: sizes that do not fit together, naming the field.
        """


class OptimizerConfig(Config, Protocol):
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


class ScheduleConfig(Config, Protocol):
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


@runtime_checkable
class SettlesLate(Protocol):
    """A schedule whose first part does not depend on how long the run will be."""

    def settles_at(self, total: int) -> float:
        """Share of a run of ``total`` steps up to which the factors are those of a run of any length."""


# ------------------------------------------------------------------------------------------------------- objectives


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
class Denoises(Protocol):
    """An objective whose model finds images in noise: what ``danlu encode`` needs."""

    @property
    def schedule(self) -> Any:
        """The noise process, a schedule of :mod:`danlu.diffusion`."""

    def denoiser(self, shape: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the model as a function ``(x, t) -> x0`` of images ``shape`` ``(n, c, h, w)``."""


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
