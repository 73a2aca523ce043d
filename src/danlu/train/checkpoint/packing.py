"""State as tensors by path and a tree of plain values that says where each belongs."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from danlu.optim._sharded import local

__all__ = ["pack", "places", "plain_groups", "targets", "unpack"]


def pack(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Separate the tensors of ``state`` from the rest: ``(tensors by path, JSON tree with their places)``.

    Raises:
        TypeError: a value is neither a tensor nor plain.

    >>> import torch
    >>> tensors, tree = pack({"step": 3, "weight": torch.zeros(2)})
    >>> list(tensors), tree
    (['weight'], {'step': 3, 'weight': {'$tensor': 'weight', 'shape': [2]}})
    """
    tensors: dict[str, Tensor] = {}
    homes: dict[tuple[Any, ...], str] = {}  # tied weights are one tensor under two names
    storages: set[int] = set()

    def place(tensor: Tensor, path: str) -> str:
        held = local(tensor)
        storage = held.untyped_storage().data_ptr()
        identity = (storage, held.storage_offset(), tensor.dtype, tuple(tensor.shape), held.stride())
        if tensor.numel() and storage and identity in homes:
            return homes[identity]
        if path in tensors:
            raise TypeError(f"two tensors of the state share the path {path!r}")
        # A scalar is kept as one element: not every reader of the file format slices zero dimensions.
        kept = tensor.reshape(1) if tensor.dim() == 0 else tensor.contiguous()
        storage = local(kept).untyped_storage().data_ptr()
        tensors[path] = kept.clone() if storage in storages else kept  # the file format takes no overlapping memory
        storages.add(storage)
        homes[identity] = path
        return path

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return {"$tensor": place(value.detach(), path), "shape": list(value.shape)}
        if isinstance(value, float) and not math.isfinite(value):
            return {"$float": repr(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: walk(item, _join(path, key)) for key, item in value.items()}
            return {"$dict": [[walk(key, path), walk(item, _join(path, key))] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [walk(item, _join(path, i)) for i, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        raise TypeError(f"state {path!r} must hold tensors and plain values, got {type(value).__name__}")

    tree = walk(state, "")
    return tensors, tree


def unpack(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """Put together what :func:`pack` separated."""
    if isinstance(tree, list):
        return [unpack(tensors, item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        found = tensors[tree["$tensor"]]
        return found if list(found.shape) == tree["shape"] else found.reshape(tree["shape"])
    if "$float" in tree:
        return float(tree["$float"])
    if "$tuple" in tree:
        return tuple(unpack(tensors, item) for item in tree["$tuple"])
    if "$dict" in tree:
        return {unpack(tensors, key): unpack(tensors, item) for key, item in tree["$dict"]}
    return {key: unpack(tensors, item) for key, item in tree.items()}


def places(tree: Any) -> Iterator[str]:
    """Yield the paths of the tensors that belong in a packed tree."""
    if isinstance(tree, list):
        for item in tree:
            yield from places(item)
    elif isinstance(tree, dict):
        if "$tensor" in tree:
            yield tree["$tensor"]
        else:
            yield from places(list(tree.values()))


def targets(tree: Any, into: Any) -> dict[str, Tensor]:
    """Return the tensors of ``into`` that have the place and the shape of one in a packed tree, by its path.

    >>> import torch
    >>> into = {"weight": torch.zeros(2)}
    >>> targets({"weight": {"$tensor": "weight", "shape": [2]}}, into)["weight"] is into["weight"]
    True
    """
    found: dict[str, Tensor] = {}

    def walk(tree: Any, into: Any) -> None:
        if isinstance(tree, list):
            if isinstance(into, (list, tuple)) and len(into) == len(tree):
                for item, there in zip(tree, into):
                    walk(item, there)
        elif isinstance(tree, dict):
            if "$tensor" in tree:
                if isinstance(into, Tensor) and list(into.shape) == tree["shape"]:
                    found.setdefault(tree["$tensor"], into)
            elif "$tuple" in tree:
                walk(tree["$tuple"], into)
            elif isinstance(into, Mapping):
                pairs = tree["$dict"] if "$dict" in tree else tree.items()
                for key, item in pairs:
                    walk(item, into.get(key) if isinstance(key, (str, int)) else None)

    walk(tree, into)
    return found


def plain_groups(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state without the settings that are no plain values: the configuration gives those again.

    >>> import torch
    >>> plain_groups({"state": {}, "param_groups": [{"lr": 0.1, "dtype": torch.float32, "params": [0]}]})
    {'state': {}, 'param_groups': [{'lr': 0.1, 'params': [0]}]}
    """
    groups = [{key: value for key, value in group.items() if _is_plain(value)} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _join(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)
