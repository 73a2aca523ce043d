"""Sort a model's parameters by what they are, so that each meets the update rule made for it.

A matrix that multiplies activations, a table of embeddings and a gain of a norm are all tensors of floats, but an
orthogonalised update is right for the first only. The role of a parameter follows from the module that owns it, its
name and its shape; a layer that knows better says so with :func:`declare`, which also tells which rows of a fused
matrix belong apart: a number of equal blocks (heads) or a tuple of block heights (query, key and value of one
projection), and whether a weight is kept transposed. A user's last word are the attributes ``danlu_role``,
``danlu_split`` and ``danlu_transposed`` of the parameter itself.
"""

import contextlib
import io
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from danlu._roles import ATTRIBUTES, ROLES, declaration
from danlu.optim._classify import Kind, Model, classify

Group = dict[str, Any]


def _owners(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.Parameter]]:
    """Yield (module path, name, module, parameter) for every place that holds a parameter, tied ones repeatedly."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield path, name, module, parameter


def param_groups(model: nn.Module) -> list[Group]:
    """Sort the trainable parameters of ``model`` into groups of one role and one split.

    Args:
        model: any module. Parameters that need no gradient are left out. A parameter that several modules share
            (a head tied to its embedding) counts once, under the first of declared role, embedding and head.

    Returns:
        Groups that any ``torch.optim`` optimizer accepts: dictionaries of ``params``, ``param_names``, ``role``
        (one of :data:`ROLES`), ``split`` (rows that belong apart, or None), ``transposed`` (whether inputs come
        before outputs) and ``note`` (what is not certain of them, or None), in the order of :data:`ROLES`.

    Raises:
        TypeError: ``model`` is no module, or a parameter is complex or has not been materialised.
        ValueError: ``model`` has no trainable parameter, or a layer declared a role or split that cannot be.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 8), nn.LayerNorm(8))
    >>> [(g["role"], g["param_names"]) for g in param_groups(model)]
    [('matrix', ['1.weight']), ('embedding', ['0.weight']), ('gain', ['2.weight']), ('bias', ['1.bias', '2.bias'])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    known = Model(model)
    found: dict[int, tuple[int, str, nn.Parameter, Kind]] = {}
    for path, name, module, parameter in _owners(model):
        if not parameter.requires_grad:
            continue
        full = f"{path}.{name}" if path else name
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise TypeError(
                f"parameter {full} of a lazy module has no shape yet; run one batch through the model first"
            )
        if parameter.is_complex():
            raise TypeError(f"parameter {full} is complex ({parameter.dtype}); accepted are real dtypes")
        kind = classify(full, module, name, known.place(path, name, module, parameter), known)
        said = declaration(module, name).role is not None
        rank = 0 if said else {"embedding": 1, "head": 2}.get(kind.role, 3)
        if id(parameter) not in found or rank < found[id(parameter)][0]:
            first = found[id(parameter)][1] if id(parameter) in found else full
            found[id(parameter)] = (rank, first, parameter, kind)
    if not found:
        raise ValueError("model has no parameter that requires a gradient")

    buckets: dict[Kind, Group] = {}
    for _, name, parameter, kind in found.values():
        group = buckets.setdefault(kind, {"params": [], "param_names": [], **kind._asdict()})
        group["params"].append(parameter)
        group["param_names"].append(name)
    groups = [buckets[kind] for kind in sorted(buckets, key=_order)]
    check_partition(groups, model)
    return groups


@contextlib.contextmanager
def declarations_kept(model: nn.Module) -> Iterator[None]:
    """Give the parameters that replace those of ``model`` within a block what was written on the old ones.

    ``fully_shard`` puts new parameters in place of a module's own, without the attributes ``danlu_role``,
    ``danlu_split`` and ``danlu_transposed`` that a user has set on them. What :func:`danlu.optim.declare` says needs
    no such care.

    Raises:
        ValueError: a parameter that carried a declaration is no longer there under its name.

    Example::

        with declarations_kept(model):
            fully_shard(model)
        optimizer = MuonConfig().build(model)
    """
    notes = {
        name: {key: getattr(parameter, key) for key in ATTRIBUTES if hasattr(parameter, key)}
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    yield
    new = dict(model.named_parameters(remove_duplicate=False))
    lost = [name for name, note in notes.items() if note and name not in new]
    if lost:
        raise ValueError(f"model has no parameter {', '.join(lost)} any more, which carried a declaration")
    for name, note in notes.items():
        for key, value in note.items():
            setattr(new[name], key, value)


def _order(kind: Kind) -> tuple[int, tuple[int, ...], bool, str]:
    split = kind.split if isinstance(kind.split, tuple) else (kind.split or 0,)
    return ROLES.index(kind.role), split, kind.transposed, kind.note or ""


def check_partition(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> None:
    """Raise ValueError unless every trainable parameter of ``model`` is in ``groups`` exactly once.

    For groups that were edited by hand: a parameter that no group holds is silently never trained.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    seen: set[int] = set()
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            if id(parameter) in seen:
                label = names.get(id(parameter), f"of shape {tuple(parameter.shape)}")
                raise ValueError(f"parameter {label} of group {index} is in the groups twice")
            seen.add(id(parameter))
    lost = [name for key, name in names.items() if key not in seen]
    if lost:
        raise ValueError(f"no group holds the parameter{'s' if len(lost) > 1 else ''} {', '.join(lost)}")


def _folded(names: Sequence[str]) -> list[str]:
    """Return the names with layer numbers replaced by ``*``, each once, in order of appearance."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) for name in names))


def describe(groups: Sequence[Mapping[str, Any]], *, width: int = 110) -> str:
    """Return a table of the groups as text: role, split, tensors, parameters, shapes and names.

    A weight kept as (inputs, outputs) has ``in > out`` behind its shape; what is not certain of a group stands below.

    Args:
        groups: what :func:`param_groups` returned, or the ``param_groups`` of an optimizer made from it, of which the
            table says the decay, too.
        width: columns of the table.

    >>> from torch import nn
    >>> print(describe(param_groups(nn.Linear(3, 5)), width=80))
    role     split   tensors   parameters   shapes   names
    ───────────────────────────────────────────────────────
    matrix       -         1           15   5 x 3    weight
    bias         -         1            5   5        bias
    total        -         2           20
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column, justify in (("role", "left"), ("split", "right"), ("tensors", "right"), ("parameters", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("shapes")
    table.add_column("names", overflow="fold")
    tensors = numbers = 0
    decaying = all("weight_decay" in group for group in groups)
    if decaying:
        table.add_column("decay", justify="right")
    notes: list[str] = []
    for group in groups:
        params: list[Tensor] = list(group["params"])
        count = sum(p.numel() for p in params)
        turned = " in > out" if group.get("transposed") else ""
        shapes = dict.fromkeys((" x ".join(map(str, p.shape)) or "scalar") + turned for p in params)
        names = ", ".join(_folded(group.get("param_names", ())))
        if group.get("note"):
            notes.append(f"{names}: {group['note']}")
        split = group.get("split")
        table.add_row(
            str(group.get("role") or "-"),
            "-" if split is None else "+".join(map(str, split)) if isinstance(split, tuple) else str(split),
            str(len(params)),
            f"{count:,}",
            ", ".join(shapes),
            names,
            *([f"{group['weight_decay']:g}" if group["weight_decay"] else "none"] if decaying else []),
        )
        tensors, numbers = tensors + len(params), numbers + count
    table.add_row("total", "-", str(tensors), f"{numbers:,}", *("" for _ in table.columns[4:]))
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(table)
    lines = [line.rstrip() for line in out.getvalue().rstrip().splitlines()]
    wrapped = (textwrap.wrap(note, width, subsequent_indent="  ") for note in notes)
    return "\n".join([*lines, *itertools.chain([""] if notes else [], *wrapped)])
