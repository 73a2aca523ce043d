"""Models, optimizers and learning rates."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu.protocols.config import Config

__all__ = [
    "CountsOperations",
    "CountsParameters",
    "Decays",
    "LanguageModel",
    "Model",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "SettlesLate",
]


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
class LanguageModel(Protocol):
    """A model of tokens whose hidden states a loss can be computed from, without storing logits.

    Attributes:
        embedding: ``(vocab, dim)``.
        head_weight: ``(vocab, dim)``, what turns hidden states into logits.
    """

    embedding: Tensor

    @property
    def head_weight(self) -> Tensor:
        """``(vocab, dim)``."""

    def hidden(self, tokens_bt: Tensor, *, documents: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Hidden states ``(batch, time, dim)`` of tokens ``(batch, time)``; arguments as `danlu.models.Transformer`.

        A model whose experts are balanced (`danlu.nn.balance`) takes ``real`` as well.
        """


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


@runtime_checkable
class HasBlocks(Protocol):
    """A network that says which of its parts are placed, run again and compiled one by one.

    Each is called as a module, with everything that it computes in its ``forward``.
    """

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The blocks, in order; what is in none of them is treated as one more."""


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
class Decays(Protocol):
    """A schedule with a stable phase, from any step of which a run can begin its decay."""

    def decaying_from(self, step: int, total: int, decay: int | None = None) -> "tuple[ScheduleConfig | None, int]":
        """Return the schedule, and the length, of a run that decays from ``step`` on.

        Args:
            step: steps that were taken.
            total: length of the run that took them.
            decay: steps of the decay; None for the share that the schedule gives it.

        Returns:
            The schedule has the same factors before ``step``; it is None where that is not in the stable phase.
        """


@runtime_checkable
class SettlesLate(Protocol):
    """A schedule whose first part does not depend on how long the run will be."""

    def settles_at(self, total: int) -> float:
        """Share of a run of ``total`` steps up to which the factors are those of a run of any length."""
