r"""The spectral condition: initialisation and learning rates by shape, so that a rate found narrow serves wide.

Features keep their size, and change by as much in a step, at every width when each weight that maps ``in`` to ``out``
has :math:`\lVert W \rVert_2` and :math:`\lVert \Delta W \rVert_2` of the order of :math:`\sqrt{out / in}`. This is the
maximal-update parametrisation, read off the shapes alone.

Sources: Yang, Simon & Bernstein, "A Spectral Condition for Feature Learning", arXiv:2310.17813; Yang et al., "Tensor
Programs V", arXiv:2203.03466, table 8.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from danlu._roles import map_of
from danlu._validate import choice, integer, number, positive
from danlu.optim.groups import Group, param_groups
from danlu.optim.muon_step import shape_scale

_RULES = ("adam", "sgd")


def spectral_std(rows: int, columns: int) -> float:
    r"""Return the standard deviation at which a Gaussian matrix has the spectral norm sqrt(rows / columns).

    It is ``sqrt(rows / columns) / (sqrt(rows) + sqrt(columns))``: between half of and all of the familiar
    ``min(1, sqrt(rows / columns)) / sqrt(columns)``. The norm is met to about 2 % from 64 rows and columns on.

    >>> spectral_std(256, 256), spectral_std(16, 65536)
    (0.03125, 6.00...e-05)
    """
    integer("rows", rows)
    integer("columns", columns)
    return math.sqrt(rows / columns) / (math.sqrt(rows) + math.sqrt(columns))


def mup_factor(rows: int, columns: int, base_width: int, rule: Literal["adam", "sgd"] = "adam") -> float:
    """Return the factor on the learning rate of a matrix that maps ``columns`` to ``rows``.

    ``adam``, for every rule whose updates have entries of one size (AdamW, Lion, Amos): ``base_width / columns``.
    ``sgd``, for updates proportional to the gradient: ``rows / columns``. Muon needs none with ``scale="mup"``.

    >>> mup_factor(1024, 1024, base_width=128), mup_factor(4096, 1024, base_width=128, rule="sgd")
    (0.125, 4.0)
    """
    integer("rows", rows)
    integer("columns", columns)
    integer("base_width", base_width)
    choice("rule", rule, _RULES)
    return base_width / columns if rule == "adam" else rows / columns


def muon_from_adamw(lr: float, weight_decay: float, shape: Sequence[int], scale: str = "plain") -> tuple[float, float]:
    """Return Muon's learning rate and decay for a matrix that AdamW trained well with ``lr`` and ``weight_decay``.

    With the scales ``moonlight`` and ``rms`` they are AdamW's own. With the others the rate is multiplied by what those
    have more, ``0.2 sqrt(max(rows, columns)) / s(shape)``, and the decay divided by it: the size of an update and the
    product of learning rate and decay stay. For square matrices of 1024, 2048 and 4096 that is 6.4, 9.05 and 12.8.

    Args:
        lr: AdamW's learning rate.
        weight_decay: AdamW's decoupled decay.
        shape: (rows, columns).
        scale: as `danlu.optim.shape_scale`.

    Source: kexue.fm 11416, from Liu et al., arXiv:2502.16982.

    >>> muon_from_adamw(1e-3, 0.128, (4096, 4096))
    (0.0128, 0.01)
    """
    number("lr", lr, low=0)
    number("weight_decay", weight_decay, low=0)
    if len(shape) != 2:
        raise ValueError(f"shape must be (rows, columns), got {tuple(shape)}")
    for name, size in zip(("rows", "columns"), shape):
        integer(name, size)
    factor = shape_scale("moonlight", *shape) / shape_scale(scale, *shape)
    return lr * factor, weight_decay / factor


def mup_groups(
    model: nn.Module,
    lr: float,
    base_width: int,
    *,
    rule: Literal["adam", "sgd"] = "adam",
    weight_decay: float = 0.0,
) -> list[Group]:
    """Sort a model's parameters into groups whose rates follow their shapes, from one rate found at ``base_width``.

    ====================================  ======================  ====================
    parameters                            ``adam``                ``sgd``
    ====================================  ======================  ====================
    matrices, experts, kernels, the head  base_width / columns    rows / columns
    embeddings (last dimension), vectors  1                       size / base_width
    ====================================  ======================  ====================

    No base shapes are asked for: a size that does not grow with the width (pixels, classes) adds a constant factor,
    the same at every width. The product of learning rate and decay is that of the plain groups, ``lr * weight_decay``.

    Args:
        model: any module; its roles are those of `danlu.optim.param_groups`. Train it from `spectral_init_`.
        lr: learning rate, best at width ``base_width``.
        base_width: the width at which a square matrix takes ``lr``.
        rule: ``adam`` for AdamW, Lion and the like, ``sgd`` for gradient descent with or without momentum.
        weight_decay: decoupled decay of everything but gains and biases.

    Returns:
        Groups with ``params``, ``param_names``, ``role``, ``split``, ``transposed``, ``lr`` and ``weight_decay``.

    >>> model = nn.Sequential(nn.Embedding(11, 512), nn.Linear(512, 2048, bias=False), nn.Linear(2048, 512, bias=False))
    >>> [(group["param_names"], group["lr"]) for group in mup_groups(model, 1e-2, base_width=128)]
    [(['1.weight'], 0.0025), (['2.weight'], 0.000625), (['0.weight'], 0.01)]
    """
    positive("lr", lr)
    integer("base_width", base_width)
    choice("rule", rule, _RULES)
    number("weight_decay", weight_decay, low=0)
    found: dict[tuple[int, float], Group] = {}
    for index, group in enumerate(param_groups(model)):
        decay = 0.0 if group["role"] in ("gain", "bias") else weight_decay
        for name, parameter in zip(group["param_names"], group["params"]):
            if group["role"] in ("embedding", "gain", "bias"):
                factor = 1.0 if rule == "adam" else max(parameter.shape[-1:], default=1) / base_width
            else:
                (rows, *_), columns = _shapes(group, parameter)
                factor = mup_factor(rows, columns, base_width, rule)
            fresh = {**group, "params": [], "param_names": [], "lr": lr * factor, "weight_decay": decay / factor}
            held = found.setdefault((index, factor), fresh)
            held["params"].append(parameter)
            held["param_names"].append(name)
    return [found[key] for key in sorted(found, key=lambda key: (key[0], -key[1]))]


@torch.no_grad()
def spectral_init_(
    model: nn.Module, *, gain: Callable[[str], float] | None = None, generator: torch.Generator | None = None
) -> nn.Module:
    """Draw every linear map of ``model`` with the spectral norm sqrt(out / in), and embeddings with entries of size 1.

    Rows that belong apart (query, key and value in one weight, heads) are maps of their own. Gains and biases stay. A
    head that is tied to its embedding cannot be right as both: it stays an embedding.

    Args:
        model: any module, its trainable parameters changed in place.
        gain: factor on the norm of the matrix of this name, for instance ``(2 * layers) ** -0.5`` on maps that write
            to a residual stream; None: 1 everywhere.
        generator: source of randomness; None is torch's global one.

    Returns:
        ``model``.

    >>> layer = spectral_init_(nn.Linear(256, 1024), generator=torch.Generator().manual_seed(0))
    >>> torch.linalg.matrix_norm(layer.weight, 2).round(decimals=1)  # sqrt(1024 / 256)
    tensor(2., grad_fn=<...>)
    """
    for group in param_groups(model):
        role, transposed = group["role"], group["transposed"]
        for name, parameter in zip(group["param_names"], group["params"]):
            if role == "embedding":
                nn.init.normal_(parameter, generator=generator)
            elif role not in ("gain", "bias"):
                heights, columns = _shapes(group, parameter)
                size = 1.0 if gain is None else gain(name)
                if role == "conv" and transposed:  # its groups are maps of one shape
                    nn.init.normal_(parameter, std=size * spectral_std(heights[0], columns), generator=generator)
                    continue
                rows_at = 0 if role != "experts" else -2
                for block in torch.split(parameter.mT if transposed else parameter, heights, dim=rows_at):
                    nn.init.normal_(block, std=size * spectral_std(block.shape[rows_at], columns), generator=generator)
    return model


def _shapes(group: Group, parameter: Tensor) -> tuple[list[int], int]:
    """Return the heights of the maps stacked in a parameter's rows, and their number of columns."""
    split, role, transposed = group["split"], group["role"], group["transposed"]
    rows, columns = map_of(role, parameter.shape, split, transposed=transposed)
    if split is None or (role == "conv" and transposed):
        return [rows], columns
    return [rows // split] * split if isinstance(split, int) else list(split), columns
