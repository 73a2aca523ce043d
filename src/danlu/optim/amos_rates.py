"""Learning rate, decay and half-life of sign-like optimizers, read off the balance of progress and decay.

Source: Su, kexue.fm 9344, from Tian & Parikh, arXiv:2210.11693.
"""

import math
from dataclasses import dataclass

from danlu._roles import ROLES
from danlu._validate import choice, integer, number, positive


@dataclass(frozen=True, kw_only=True)
class AmosHyperparameters:
    """Learning rate, decay and half-life for AdamW or Lion, from Amos' balance of progress and decay.

    Attributes:
        lr: learning rate at the beginning.
        weight_decay: decoupled decay as in AdamW, constant.
        half_life: steps after which the learning rate has halved, for :class:`danlu.optim.InverseTime`.
    """

    lr: float
    weight_decay: float
    half_life: float


def amos_hyperparameters(
    d: int, *, step: float = 1e-3, alignment: float = 0.05, constant: bool = False, role: str = "matrix"
) -> AmosHyperparameters:
    """Return hyper-parameters for updates whose entries have size one (Lion, Tiger, AdamW), without a search.

    A weight of expected size sigma moves by ``step * sigma``; the decay that cancels the second order of that move is
    step^2 / 2 a step, that is ``step / (2 sigma)`` times the learning rate. With p the cosine between update and
    remaining error, the learning rate halves after 1 / (2 step p) steps if p fades with the error, and after
    (sqrt(2) - 1) / (step p) steps (then quadratically) if it is constant.

    The decay is of the order that leaves the distance to the optimum unharmed while the weights are still far from
    it; late in training the argument no longer holds, though the schedule does.

    Args:
        d: inputs of a matrix, or width of an embedding; unused for gains and biases.
        step: relative change of a weight at the beginning, about 1e-3; 1e-2 for easy tasks.
        alignment: the cosine p at the beginning.
        constant: the cosine stays: use ``InverseTime(half_life=..., squared=True)``.
        role: one of :data:`danlu.optim.ROLES`; sigma is 1 / sqrt(d) for maps and embeddings, 1/2 for gains and biases.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Su, kexue.fm 9344.

    >>> found = amos_hyperparameters(768, step=1.11e-3)
    >>> print(f"{found.lr:.4g} {found.weight_decay:.4g} {found.half_life:.5g}")
    4.005e-05 0.01538 9009
    """
    integer("d", d)
    positive("step", step)
    number("alignment", alignment, low=0, high=1, low_open=True)
    choice("role", role, ROLES)
    sigma = 0.5 if role in ("gain", "bias") else 1.0 / math.sqrt(d)
    life = (math.sqrt(2.0) - 1.0) / (step * alignment) if constant else 1.0 / (2.0 * step * alignment)
    return AmosHyperparameters(lr=step * sigma, weight_decay=step / (2.0 * sigma), half_life=life)
