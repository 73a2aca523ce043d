"""What a parameter is: its role and the rows that belong apart, declared by the module that owns it.

The declaration stands on the module, under the parameter's name, because parameters are replaced: by ``fully_shard``
and ``parallelize_module``, by ``to_empty`` after building on the meta device, by a deep copy. It stands on the
parameter as well, for an optimizer that is handed bare parameters. Where the two differ, the parameter's attributes
``danlu_role`` and ``danlu_split`` hold, so that whoever uses a layer has the last word.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from danlu._validate import choice

Role = Literal["matrix", "experts", "conv", "embedding", "head", "gain", "bias"]
Split = int | tuple[int, ...] | None

ROLES: tuple[str, ...] = get_args(Role)
#: The roles whose parameters are linear maps, for optimizers that orthogonalise.
MATRIX_ROLES = ("matrix", "experts", "conv")
#: The attribute of a module that holds {parameter's name: (role, split)}.
_DECLARED = "danlu_roles"


def declare(module: nn.Module, name: str, role: Role, split: Split = None) -> None:
    """Say what a parameter of a module is, so that ``danlu.optim.param_groups`` need not guess.

    Args:
        module: what holds the parameter directly. The declaration stays with it when the parameter is replaced, as
            ``fully_shard``, ``parallelize_module``, ``to_empty`` and ``copy.deepcopy`` do.
        name: the parameter's name in ``module``.
        role: what an optimizer should take it for.
        split: rows of independent matrices that share one fused weight (query, key, value, or heads): a number of
            equal blocks, or a tuple of heights. An optimizer that acts on complete matrices treats each of them apart,
            as if they had been separate parameters.

    Raises:
        TypeError: ``module`` is no module, or ``split`` no integers.
        ValueError: the module has no such parameter, the role is unknown or does not fit its shape, or the split does
            not cover its rows.

    >>> from torch import nn
    >>> layer = nn.Linear(4, 6)
    >>> declare(layer, "weight", "matrix", split=(4, 2))
    >>> declaration(layer, "weight")
    ('matrix', (4, 2))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be the torch.nn.Module that holds the parameter, got {type(module).__name__}")
    parameter = dict(module.named_parameters(recurse=False, remove_duplicate=False)).get(name)
    if parameter is None:
        raise ValueError(f"name must be a parameter of the {type(module).__name__} itself, got {name!r}")
    _check(name, role, split, parameter)
    setattr(module, _DECLARED, {**getattr(module, _DECLARED, {}), name: (role, split)})
    parameter.danlu_role, parameter.danlu_split = role, split  # type: ignore[attr-defined]


def declaration(module: nn.Module, name: str) -> tuple[str | None, Split]:
    """Return the role and the split that hold for a parameter of a module, None where nothing was declared."""
    parameter = getattr(module, name)
    role, split = getattr(module, _DECLARED, {}).get(name, (None, None))
    own_role, own_split = getattr(parameter, "danlu_role", None), getattr(parameter, "danlu_split", None)
    return role if own_role is None else own_role, split if own_split is None else own_split


def declared(name: str, parameter: Tensor, module: nn.Module | None = None) -> tuple[str | None, Split]:
    """Return the role and the normal split declared for a parameter; raise if its shape contradicts them.

    Args:
        name: what errors call the parameter.
        parameter: of which a role and a split may stand on itself.
        module: what holds it under the last part of ``name``; None for a bare parameter.
    """
    if module is None:
        role, split = getattr(parameter, "danlu_role", None), getattr(parameter, "danlu_split", None)
    else:
        role, split = declaration(module, name.rpartition(".")[2])
    _check(name, role, split, parameter)
    return role, normal_split(split)


def _check(name: str, role: str | None, split: Split, parameter: Tensor) -> None:
    """Raise unless a parameter of this shape can be what was declared."""
    if role is not None:
        choice(f"danlu_role of {name}", role, ROLES)
        needed = {"matrix": 2, "experts": 3, "conv": 2}.get(role, 0)
        if parameter.ndim < needed or (role == "matrix" and parameter.ndim > 2):
            raise ValueError(f"{name} is declared {role!r}, which its shape {tuple(parameter.shape)} cannot be")
    if split is not None and parameter.ndim >= 2:
        check_split(name, split, rows_of(role or ("experts" if parameter.ndim == 3 else "matrix"), parameter.shape))


def check_split(name: str, split: Split, rows: int) -> None:
    """Raise unless ``split`` divides the ``rows`` of the parameter called ``name``."""
    if split is None:
        return
    if isinstance(split, bool) or not isinstance(split, (int, tuple)):
        raise TypeError(f"split of {name} must be an integer, a tuple of integers or None, got {split!r}")
    if isinstance(split, int):
        if split < 1 or rows % split:
            raise ValueError(f"split of {name} must divide its {rows} rows, got {split}")
        return
    if not split or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in split) or sum(split) != rows:
        raise ValueError(f"split of {name} must be positive block heights that sum to its {rows} rows, got {split!r}")


def rows_of(role: str, shape: Sequence[int]) -> int:
    """Return the number of rows of one matrix of a parameter: of one expert for a stack."""
    return shape[-2] if role == "experts" else shape[0]


def normal_split(split: Split | Sequence[int]) -> Split:
    """Return equal heights as their number, so that the blocks can be stacked, and one height as no split at all.

    >>> normal_split((4, 4, 4)), normal_split((4, 2)), normal_split((4,))
    (3, (4, 2), None)
    """
    if split is None or isinstance(split, int):
        return None if split == 1 else split
    if len(set(split)) == 1:
        return None if len(split) == 1 else len(split)
    return tuple(split)
