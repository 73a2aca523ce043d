r"""What a denoising network may predict, and how each prediction converts to every other.

With ``x = a x_0 + b eps`` (:mod:`danlu.diffusion.schedule`) the pair (x_0, eps) follows from x and any one of

============  =======================================  ========================================
``eps``       the noise                                Ho et al., arXiv:2006.11239
``x0``        the data
``v``         ``a eps - b x_0``                        Salimans and Ho, arXiv:2202.00512
``velocity``  ``da/dt x_0 + db/dt eps``, dx/dt         Lipman et al., arXiv:2210.02747
``score``     ``-eps / b``, the gradient of ln p(x)    Song et al., arXiv:2011.13456
``edm``       F in ``x_0 = c_skip x + c_out F``        Karras et al., arXiv:2206.00364, table 1
============  =======================================  ========================================

All are linear in (x_0, eps), so what holds for the quantities holds for their conditional means, which is what a
network learns. ``edm`` is written here for any schedule; with ``a^2 + b^2 = 1`` and data of standard deviation 1 it is
``-v``.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from danlu._validate import choice, positive
from danlu.diffusion.schedule import Schedule, broadcast

__all__ = ["PREDICTIONS", "Prediction", "convert", "from_x0_eps", "input_scale", "preconditioning", "to_x0_eps"]

Prediction = Literal["eps", "x0", "v", "velocity", "score", "edm"]

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def to_x0_eps(
    value: Tensor, x: Tensor, t: Tensor | float, schedule: Schedule, kind: Prediction, *, data_std: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Return the data and the noise that a prediction implies.

    Args:
        value: the prediction, ``(b, ...)``.
        x: the noisy sample it was made for, of the same shape.
        t: one time or one for each row.
        schedule: gives a and b.
        kind: what ``value`` is, one of :data:`PREDICTIONS`.
        data_std: standard deviation of the data, for ``edm`` only.

    Returns:
        ``x_0`` and ``eps`` with ``a x_0 + b eps = x``. Where a division by a or b is unavoidable (``eps`` at a = 0,
        ``x0`` at b = 0) the result there is not finite.

    Raises:
        ValueError: ``kind`` is not one of :data:`PREDICTIONS`.

    >>> from danlu.diffusion import Flow
    >>> x0, eps = to_x0_eps(torch.tensor([3.0]), torch.tensor([1.0]), 0.5, Flow(), "velocity")
    >>> x0.item(), eps.item()
    (-0.5, 2.5)
    """
    choice("kind", kind, PREDICTIONS)
    a, b = (broadcast(c, x) for c in schedule.coefficients(t))
    if kind == "eps":
        return (x - b * value) / a, value
    if kind == "score":
        return (x + b * b * value) / a, -b * value
    if kind == "x0":
        return value, (x - a * value) / b
    if kind == "v":
        power = a * a + b * b
        return (a * x - b * value) / power, (b * x + a * value) / power
    if kind == "velocity":
        da, db = (broadcast(c, x) for c in schedule.derivatives(t))
        determinant = a * db - b * da
        return (db * x - b * value) / determinant, (a * value - da * x) / determinant
    positive("data_std", data_std)
    root = _root(a, b, data_std)
    x0 = a * (data_std / root) ** 2 * x + b * data_std / root * value
    return x0, b / root**2 * x - a * data_std / root * value


def from_x0_eps(
    x0: Tensor, eps: Tensor, t: Tensor | float, schedule: Schedule, kind: Prediction, *, data_std: float = 0.5
) -> Tensor:
    """Return the prediction of ``kind`` for data ``x0`` and noise ``eps``: the training target of a network.

    Raises:
        ValueError: ``kind`` is not one of :data:`PREDICTIONS`.

    >>> from danlu.diffusion import Flow
    >>> from_x0_eps(torch.tensor([-0.5]), torch.tensor([2.5]), 0.5, Flow(), "velocity").item()
    3.0
    """
    choice("kind", kind, PREDICTIONS)
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    a, b = (broadcast(c, x0) for c in schedule.coefficients(t))
    if kind == "score":
        return -eps / b
    if kind == "v":
        return a * eps - b * x0
    if kind == "velocity":
        da, db = (broadcast(c, x0) for c in schedule.derivatives(t))
        return da * x0 + db * eps
    positive("data_std", data_std)
    return (b * x0 - a * data_std**2 * eps) / (data_std * _root(a, b, data_std))


def convert(
    value: Tensor,
    x: Tensor,
    t: Tensor | float,
    schedule: Schedule,
    *,
    source: Prediction,
    target: Prediction,
    data_std: float = 0.5,
) -> Tensor:
    """Return a prediction of kind ``source`` as one of kind ``target``; arguments as in :func:`to_x0_eps`.

    >>> from danlu.diffusion import Cosine
    >>> x, eps = torch.tensor([1.0]), torch.tensor([0.5])
    >>> score = convert(eps, x, 0.5, Cosine(), source="eps", target="score")
    >>> round(convert(score, x, 0.5, Cosine(), source="score", target="eps").item(), 6)
    0.5
    """
    x0, eps = to_x0_eps(value, x, t, schedule, source, data_std=data_std)
    return from_x0_eps(x0, eps, t, schedule, target, data_std=data_std)


def preconditioning(
    t: Tensor | float, schedule: Schedule, *, data_std: float = 0.5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``c_skip``, ``c_out``, ``c_in`` and ``c_noise`` of EDM at ``t``, for any schedule.

    >>> from danlu.diffusion import EDM
    >>> import math
    >>> t = EDM().time(-2 * math.log(2.5))
    >>> [round(c.item(), 7) for c in preconditioning(t, EDM())]
    [0.0384615, 0.4902903, 0.3922323, 0.2290727]
    """
    a, b = schedule.coefficients(t)
    root = _root(a, b, data_std)
    return a * (data_std / root) ** 2, b * data_std / root, 1 / root, schedule.condition(t)


def input_scale(x: Tensor, t: Tensor | float, schedule: Schedule, kind: Prediction, *, data_std: float = 0.5) -> Tensor:
    """Return the network's input: ``x`` itself, or for ``edm`` ``x`` scaled to a standard deviation of 1."""
    if kind != "edm":
        return x
    a, b = (broadcast(c, x) for c in schedule.coefficients(t))
    return x / _root(a, b, data_std)


def _root(a: Tensor, b: Tensor, data_std: float) -> Tensor:
    """Return the standard deviation of ``a x_0 + b eps``."""
    return torch.hypot(a * data_std, b)
