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
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from danlu._roles import ATTRIBUTES, ROLES, Split, declaration, declared

Group = dict[str, Any]

_HEAD_NAMES = {"lm_head", "head", "unembed", "unembedding", "embed_out", "classifier", "score", "output_projection"}
_TOP_LEVEL_HEAD_NAMES = {"output", "proj_out", "decoder", "logits"}
_QKV_NAMES = {"qkv", "qkv_proj", "to_qkv", "in_proj", "wqkv", "in_proj_weight"}
_GATE_UP_NAMES = {"gate_up_proj", "gate_up"}
_GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4, nn.RNNCell: 1, nn.GRUCell: 3, nn.LSTMCell: 4}
_TABLE_NAME = re.compile(r"embed|(^|_)(pos|wpe|wte|token|tokens)($|_)|_token")
_BIAS_NAME = re.compile(r"(^|_)(bias|beta|b|offset)($|_)")
_GAIN_NAME = re.compile(r"(^|_)(log|scale|gain|gamma|alpha|temperature|dt)($|_)|^(A|D)$")
_CONV_TYPES = (nn.modules.conv._ConvNd,)
_NORM_TYPES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)


def _fused(leaf: str, module: nn.Module, parameter: Tensor) -> Split:
    """Return how the rows of a matrix fall apart when its name says that it is several in one."""
    rows, columns = parameter.shape
    name = leaf.lower()
    if name in _GATE_UP_NAMES and rows % 2 == 0:
        return 2
    if name in _QKV_NAMES and isinstance(module, (nn.Linear, nn.MultiheadAttention)):
        if rows == 3 * columns:
            return 3
        # Grouped queries: the query block is as wide as the model, key and value share what is left.
        if columns < rows < 3 * columns and (rows - columns) % 2 == 0:
            return (columns, (rows - columns) // 2, (rows - columns) // 2)
    return None


def _linear(path: str, parameter: Tensor, vocabularies: set[int]) -> tuple[str, Split]:
    """Return role and split of the weight of the nn.Linear at ``path``."""
    leaf = path.rpartition(".")[2]
    named_head = leaf in _HEAD_NAMES or (path in _TOP_LEVEL_HEAD_NAMES)
    if named_head or (parameter.ndim == 2 and parameter.shape[0] in vocabularies):
        return "head", None
    return "matrix", None


def _by_shape(path: str, name: str, module: nn.Module, parameter: Tensor) -> tuple[str, Split]:
    """Return role and split of a parameter whose module says nothing."""
    extent = [size for size in parameter.shape if size != 1]
    if parameter.ndim >= 2 and _TABLE_NAME.search(name.lower()):
        return "embedding", None
    if len(extent) <= 1:
        if _TABLE_NAME.search(name.lower()):
            return "embedding", None
        return ("bias" if _BIAS_NAME.search(name.lower()) else "gain"), None
    if _GAIN_NAME.search(name):
        return "gain", None
    if parameter.ndim == 2:
        gates = next((count for kind, count in _GATES.items() if isinstance(module, kind)), 1)
        if gates > 1 and parameter.shape[0] % gates == 0:
            return "matrix", gates
        leaf = path.rpartition(".")[2] if name == "weight" else name
        return "matrix", _fused(leaf, module, parameter)
    return "experts", None


def _classify(path: str, name: str, module: nn.Module, parameter: Tensor, vocabularies: set[int]) -> tuple[str, Split]:
    """Return role and split of the parameter ``name`` that ``module`` at ``path`` owns."""
    full = f"{path}.{name}" if path else name
    role, split, _ = declared(full, parameter, module)
    if role is not None:
        return role, split
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding", None
    if isinstance(module, _NORM_TYPES) or type(module).__name__.endswith("Norm"):
        return ("bias" if _BIAS_NAME.search(name.lower()) else "gain"), None
    if _BIAS_NAME.search(name.lower()) and sum(size != 1 for size in parameter.shape) <= 1:
        return "bias", None
    if isinstance(module, _CONV_TYPES) and name == "weight":
        if parameter[0].numel() == math.prod(module.kernel_size):
            return "gain", None  # one kernel a channel acts on coordinates one by one: no linear map between channels
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        return "conv", split or (module.groups if module.groups > 1 and not transposed else None)
    if isinstance(module, nn.Linear) and name == "weight":
        role, fused = _linear(path, parameter, vocabularies)
        if role == "matrix":
            fused = _fused(path.rpartition(".")[2], module, parameter)
        return role, split or fused
    role, fused = _by_shape(path, name, module, parameter)
    return role, split or fused


def _owners(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.Parameter]]:
    """Yield (module path, name, module, parameter) for every place that holds a parameter, tied ones repeatedly."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield path, name, module, parameter


def _vocabularies(model: nn.Module) -> set[int]:
    """Return the table heights of the model's embeddings that no ordinary width equals."""
    tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    widths = {m.in_features for m in model.modules() if isinstance(m, nn.Linear)}
    return {table.num_embeddings for table in tables} - widths


def param_groups(model: nn.Module) -> list[Group]:
    """Sort the trainable parameters of ``model`` into groups of one role and one split.

    Args:
        model: any module. Parameters that need no gradient are left out. A parameter that several modules share
            (a head tied to its embedding) counts once, under the first of declared role, embedding and head.

    Returns:
        Groups that any ``torch.optim`` optimizer accepts: dictionaries of ``params``, ``param_names``, ``role``
        (one of :data:`ROLES`), ``split`` (rows that belong apart, or None) and ``transposed`` (whether inputs come
        before outputs), in the order of :data:`ROLES`.

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
    vocabularies = _vocabularies(model)
    found: dict[int, tuple[int, str, nn.Parameter, str, Split, bool]] = {}
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
        role, split = _classify(path, name, module, parameter, vocabularies)
        said = declaration(module, name)
        rank = 0 if said.role is not None else {"embedding": 1, "head": 2}.get(role, 3)
        if id(parameter) not in found or rank < found[id(parameter)][0]:
            first = found[id(parameter)][1] if id(parameter) in found else full
            found[id(parameter)] = (rank, first, parameter, role, split, said.transposed)
    if not found:
        raise ValueError("model has no parameter that requires a gradient")

    buckets: dict[tuple[str, Split, bool], Group] = {}
    for _, name, parameter, role, split, transposed in found.values():
        fresh: Group = {"params": [], "param_names": [], "role": role, "split": split, "transposed": transposed}
        group = buckets.setdefault((role, split, transposed), fresh)
        group["params"].append(parameter)
        group["param_names"].append(name)
    groups = [group for _, group in sorted(buckets.items(), key=lambda item: _order(*item[0]))]
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


def _order(role: str, split: Split, transposed: bool) -> tuple[int, tuple[int, ...], bool]:
    return ROLES.index(role), (split if isinstance(split, tuple) else (split or 0,)), transposed


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
    for group in groups:
        params: list[Tensor] = list(group["params"])
        count = sum(p.numel() for p in params)
        shapes = dict.fromkeys(" x ".join(map(str, p.shape)) or "scalar" for p in params)
        split = group.get("split")
        table.add_row(
            str(group.get("role") or "-"),
            "-" if split is None else "+".join(map(str, split)) if isinstance(split, tuple) else str(split),
            str(len(params)),
            f"{count:,}",
            ", ".join(shapes),
            ", ".join(_folded(group.get("param_names", ()))),
            *([f"{group['weight_decay']:g}" if group["weight_decay"] else "none"] if decaying else []),
        )
        tensors, numbers = tensors + len(params), numbers + count
    table.add_row("total", "-", str(tensors), f"{numbers:,}", *("" for _ in table.columns[4:]))
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
