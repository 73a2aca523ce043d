"""What a parameter is: its role, the rows that belong apart and its orientation, declared by the module that owns it.

The declaration stands on the module, under the parameter's name, because parameters are replaced: by ``fully_shard``
and ``parallelize_module``, by ``to_empty`` after building on the meta device, by a deep copy. It stands on the
parameter as well, for an optimizer that is handed bare parameters. Where the two differ, the parameter's attributes
``danlu_role``, ``danlu_split`` and ``danlu_transposed`` hold, so that whoever uses a layer has the last word.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn

from danlu._validate import choice

Role = Literal["matrix", "experts", "conv", "embedding", "head", "gain", "bias"]
Split = int | tuple[int, ...] | None

ROLES: tuple[str, ...] = get_args(Role)
#: The roles whose parameters are linear maps, for optimizers that orthogonalise.
MATRIX_ROLES = ("matrix", "experts", "conv")
#: The roles of parameters that may be kept with inputs before outputs.
TRANSPOSED_ROLES = ("matrix", "experts", "conv", "head")
#: The attribute of a module that holds {parameter's name: declaration}.
_DECLARED = "danlu_roles"
#: The attributes of a parameter, in the order of a declaration.
ATTRIBUTES = ("danlu_role", "danlu_split", "danlu_transposed")


class Declaration(NamedTuple):
    """What was said of a parameter; None where nothing was."""

    role: str | None = None
    split: Split = None
    transposed: bool = False


def declare(module: nn.Module, name: str, role: Role, split: Split = None, *, transposed: bool = False) -> None:
    """Say what a parameter of a module is, so that ``danlu.optim.param_groups`` need not guess.

    Args:
        module: what holds the parameter directly. The declaration stays with it when the parameter is replaced, as
            ``fully_shard``, ``parallelize_module``, ``to_empty`` and ``copy.deepcopy`` do.
        name: the parameter's name in ``module``.
        role: what an optimizer should take it for.
        split: rows of independent matrices that share one fused weight (query, key, value, or heads): a number of
            equal blocks, or a tuple of heights. An optimizer that acts on complete matrices treats each of them apart,
            as if they had been separate parameters.
        transposed: whether the weight is kept as (inputs, outputs), as GPT-2's ``Conv1D`` and some stacks of experts
            do. "Rows" are outputs all the same: ``split`` then counts columns of the tensor. A transposed kernel is
            kept as (inputs, outputs, ...), its rows are outputs times taps, and its split is a number of groups of
            inputs, as torch's transposed convolutions have them.

    Raises:
        TypeError: ``module`` is no module, ``split`` no integers or ``transposed`` no bool.
        ValueError: the module has no such parameter, the role is unknown or does not fit its shape, or the split does
            not cover its rows.

    >>> from torch import nn
    >>> layer = nn.Linear(4, 6)
    >>> declare(layer, "weight", "matrix", split=(4, 2))
    >>> declaration(layer, "weight")
    Declaration(role='matrix', split=(4, 2), transposed=False)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be the torch.nn.Module that holds the parameter, got {type(module).__name__}")
    parameter = dict(module.named_parameters(recurse=False, remove_duplicate=False)).get(name)
    if parameter is None:
        raise ValueError(f"name must be a parameter of the {type(module).__name__} itself, got {name!r}")
    said = Declaration(role, split, transposed)
    _check(name, said, parameter)
    setattr(module, _DECLARED, {**getattr(module, _DECLARED, {}), name: said})
    for attribute, value in zip(ATTRIBUTES, said):
        setattr(parameter, attribute, value)


def declaration(module: nn.Module, name: str) -> Declaration:
    """Return what holds for a parameter of a module: what stands on itself, else on the module, else nothing."""
    parameter = getattr(module, name)
    said = Declaration(*getattr(module, _DECLARED, {}).get(name, ()))
    own = [getattr(parameter, attribute, None) for attribute in ATTRIBUTES]
    held: list[Any] = [theirs if mine is None else mine for theirs, mine in zip(said, own)]
    return Declaration(*held)


def declared(name: str, parameter: Tensor, module: nn.Module | None = None) -> Declaration:
    """Return what was declared of a parameter, its split normal; raise if its shape contradicts it.

    Args:
        name: what errors call the parameter.
        parameter: of which a role and a split may stand on itself.
        module: what holds it under the last part of ``name``; None for a bare parameter.
    """
    if module is None:
        role, split, transposed = (getattr(parameter, attribute, None) for attribute in ATTRIBUTES)
        said = Declaration(role, split, transposed or False)
    else:
        said = declaration(module, name.rpartition(".")[2])
    _check(name, said, parameter)
    return said._replace(split=normal_split(said.split))


def _check(name: str, said: Declaration, parameter: Tensor) -> None:
    """Raise unless a parameter of this shape can be what was declared."""
    role, split, transposed = said
    if role is not None:
        choice(f"danlu_role of {name}", role, ROLES)
        needed = {"matrix": 2, "experts": 3, "conv": 2}.get(role, 0)
        if parameter.ndim < needed or (role == "matrix" and parameter.ndim > 2):
            raise ValueError(f"{name} is declared {role!r}, which its shape {tuple(parameter.shape)} cannot be")
    if not isinstance(transposed, bool):
        raise TypeError(f"transposed of {name} must be a bool, got {transposed!r}")
    if transposed and (role not in (*TRANSPOSED_ROLES, None) or parameter.ndim < 2):
        kind = f"a {role or 'parameter'} of shape {tuple(parameter.shape)}"
        raise ValueError(f"{name} is {kind}, which cannot be transposed; accepted are {', '.join(TRANSPOSED_ROLES)}")
    if split is not None and parameter.ndim >= 2:
        kind = role or ("experts" if parameter.ndim == 3 else "matrix")
        check_layout(name, kind, split, tuple(parameter.shape), transposed=transposed)


def check_layout(name: str, role: str, split: Split, shape: Sequence[int], *, transposed: bool) -> None:
    """Raise unless ``split`` fits the parameter called ``name``."""
    if role != "conv" or not transposed:
        check_split(name, split, rows_of(role, oriented(shape, transposed)))
    elif isinstance(split, tuple):
        raise TypeError(f"split of {name} must be a number of groups for a transposed kernel, got {split!r}")
    else:
        check_split(name, split, shape[0])


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


def oriented(shape: Sequence[int], transposed: bool) -> tuple[int, ...]:
    """Return the shape of a matrix or of a stack with outputs before inputs.

    >>> oriented((8, 4, 6), True)
    (8, 6, 4)
    """
    return (*shape[:-2], shape[-1], shape[-2]) if transposed else tuple(shape)


def map_of(role: str, shape: Sequence[int], split: Split = None, *, transposed: bool = False) -> tuple[int, int]:
    """Return outputs and inputs of one of the maps that a parameter holds, before its rows are split.

    The kernel of a transposed convolution maps the features of one place to all that it writes: its groups are maps
    of their own.

    >>> map_of("conv", (8, 4, 3, 3)), map_of("conv", (8, 4, 3, 3), 2, transposed=True), map_of("experts", (5, 4, 6))
    ((8, 36), (36, 4), (4, 6))
    """
    if role == "experts":
        rows, columns = oriented(shape, transposed)[-2:]
        return rows, columns
    rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
    if not transposed:
        return rows, columns
    return columns, rows // (split if role == "conv" and isinstance(split, int) else 1)


def rows_of(role: str, shape: Sequence[int]) -> int:
    """Return the number of rows of one matrix of a parameter of this oriented shape: of one expert for a stack."""
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
