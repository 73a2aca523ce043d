"""What a step did to the weights, when somebody asks: the size of updates and the spread of singular values."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu.linalg._matrix import check_matrix
from danlu.linalg._newton_schulz import at_least_float32
from danlu.optim._common import label


def singular_entropy(M: Tensor) -> Tensor:
    r"""Return how evenly the singular values of ``M`` share its energy, from 0 (rank one) to 1 (all equal).

    .. math:: -\frac{1}{\log r} \sum_i q_i \log q_i, \qquad q_i = \sigma_i^2 / \sum_j \sigma_j^2, \quad r = \min(m, n)

    Args:
        M: ``(…, m, n)``, real floating, finite.

    Returns:
        ``(…)``, in float32 at least. A zero matrix has 0, and so has a matrix of one row or column.

    Source: Liu et al., arXiv:2502.16982, section 3.4.

    >>> singular_entropy(torch.eye(3, 5)), singular_entropy(torch.ones(3, 5)).round(decimals=3)
    (tensor(1.), tensor(0.))
    """
    check_matrix("M", M)
    energy = torch.linalg.svdvals(M.to(at_least_float32(M.dtype))).square()
    total = energy.sum(-1, keepdim=True)
    share = torch.where(total > 0, energy / total, energy)
    spread = -torch.special.xlogy(share, share).sum(-1)
    entropy: Tensor = spread / math.log(max(2, share.shape[-1])) + 0.0
    return entropy


class Update(NamedTuple):
    """What one step did to one parameter.

    Attributes:
        name: of the parameter.
        rms: root mean square of the change, weight decay included, over the learning rate.
        entropy: `singular_entropy` of the weight after the step, the mean over a stack; None for a vector.
    """

    name: str
    rms: float
    entropy: float | None


@torch.no_grad()
def measured_step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> list[Update]:
    """Take one step of any optimizer and return what it did to each parameter that had a gradient.

    It copies the weights and takes their singular values: call it now and then, in the place of ``optimizer.step()``.
    AdamW's updates have a root mean square of 0.2 to 0.4, and Muon's with ``scale="moonlight"`` a little below 0.2.

    Raises:
        ValueError: the learning rate of a group is zero.

    >>> weight = torch.nn.Parameter(torch.eye(4))
    >>> weight.grad = torch.ones(4, 4)
    >>> measured_step(torch.optim.SGD([("weight", weight)], lr=0.1))
    [Update(name='weight', rms=1.0..., entropy=0.95...)]
    """
    held = []
    for position, group in enumerate(optimizer.param_groups):
        if not float(group["lr"]):
            raise ValueError(f"group {position} has the learning rate 0, by which its updates cannot be measured")
        named = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            if closure is not None or parameter.grad is not None:
                name = named[index] if named else label(position, group, index)
                held.append((name, group, parameter, parameter.clone()))
    optimizer.step() if closure is None else optimizer.step(closure)
    found = []
    for name, group, parameter, before in held:
        if parameter.grad is None:
            continue
        rms = (parameter - before).to(at_least_float32(parameter.dtype)).square().mean().sqrt() / group["lr"]
        entropy = None
        if parameter.ndim >= 2:
            flat = parameter.ndim > 3 or group.get("role") == "conv"
            entropy = float(singular_entropy(parameter.flatten(1) if flat else parameter).mean())
        found.append(Update(name, float(rms), entropy))
    return found
