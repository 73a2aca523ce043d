"""Two configurations side by side, and one number for each."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from danlu.config.tree import from_document, join, to_tree

__all__ = ["changes", "differences", "fingerprint", "flatten"]

_ABSENT = "(absent)"


def flatten(tree: Any, where: str = "") -> dict[str, Any]:
    """Return every option of a configuration (or of its tree) under its dotted path.

    >>> flatten({"model": {"dim": 8, "sizes": [1, 2]}, "seed": 0})
    {'model.dim': 8, 'model.sizes': [1, 2], 'seed': 0}
    """
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = to_tree(tree)
    if not isinstance(tree, Mapping) or (where and not tree):
        return {where: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(flatten(value, join(where, key)))
    return found


def differences(first: Any, second: Any) -> list[str]:
    """Return one line for every option in which two configurations (or their trees) differ, sorted by path.

    A configuration and a saved tree (:func:`danlu.config.to_document`) are compared after the tree was read as a
    configuration of the same class: keys that it lacks have today's defaults, old names and old formats are known.

    Raises:
        ValueError, TypeError: the tree cannot be read.

    >>> differences({"optim": {"lr": 0.02}, "seed": 0}, {"optim": {"lr": 0.01}, "seed": 0})
    ['optim.lr: 0.02 and 0.01']
    """
    found = sorted(changes(first, second).items())
    return [f"{key}: {_shown(before)} and {_shown(after)}" for key, (before, after) in found]


def changes(first: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    """Return both values of every option in which two configurations differ; "(absent)" for one that is not there.

    >>> changes({"optim": {"lr": 0.02}, "seed": 0}, {"optim": {"lr": 0.01}, "seed": 0})
    {'optim.lr': (0.02, 0.01)}
    """
    if dataclasses.is_dataclass(first) and isinstance(second, Mapping):
        second = from_document(type(first), second, name="the saved configuration", quiet=True)
    left, right = flatten(first), flatten(second)
    return {
        key: (left.get(key, _ABSENT), right.get(key, _ABSENT))
        for key in left.keys() | right.keys()
        if key not in left or key not in right or left[key] != right[key]
    }


def _shown(value: Any) -> str:
    return _ABSENT if value is _ABSENT else json.dumps(value)


def fingerprint(config: Any) -> str:
    """Return the SHA-256 (hexadecimal) of the configuration's canonical JSON: equal exactly when the trees are.

    >>> fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
    True
    """
    tree = to_tree(config) if dataclasses.is_dataclass(config) else config
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
