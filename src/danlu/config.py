"""A run's configuration as a tree of frozen dataclasses, to and from JSON (standard library only).

Every component has a frozen dataclass beside it whose fields are its arguments; a run's configuration is their tree.
This module turns such a tree into plain JSON and back, and refuses what it does not understand: an unknown key is
answered with the nearest known one, a value of the wrong type with the type that is accepted.

A field declared as one dataclass is written as a plain object. A field declared as a union of dataclasses carries the
class name under ``"type"``; a field declared as ``Any`` (a place open to any component) carries ``"module:Class"``,
and reading imports that module only if it belongs to this package or has been imported already: a configuration file
never makes a foreign module run.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

from danlu._validate import nearest

__all__ = ["Pretrained", "differences", "dumps", "fingerprint", "from_tree", "leaves", "loads", "to_tree"]

T = TypeVar("T")

_PLAIN = (bool, int, float, str)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The trained objective of another run, as a field of an objective's configuration.

    The objective's constructor takes an argument of the field's name and is given that objective, in evaluation mode
    and with averaged weights if the run keeps them.

    Attributes:
        run: the other run's folder; made absolute, so that a run can be resumed from any folder.
    """

    run: str

    def __post_init__(self) -> None:
        if not isinstance(self.run, str) or not self.run:
            raise ValueError(f"run must be the folder of a finished run, got {self.run!r}")
        object.__setattr__(self, "run", os.path.abspath(self.run))


def to_tree(config: Any) -> dict[str, Any]:
    """Return the configuration as nested dictionaries, lists and plain values, ready for JSON.

    Raises:
        TypeError: ``config`` is no dataclass, or a leaf is neither a plain value nor a tuple, list or dict of them.
        ValueError: a leaf is infinite or not a number, which JSON cannot hold.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Sizes:
    ...     dim: int = 8
    ...     ratios: tuple[float, ...] = (0.5, 2.0)
    >>> to_tree(Sizes())
    {'dim': 8, 'ratios': [0.5, 2.0]}
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config must be an instance of a dataclass, got {config!r} ({type(config).__name__})")
    hints = typing.get_type_hints(type(config))
    return {
        field.name: _encode(field.name, getattr(config, field.name), hints[field.name])
        for field in dataclasses.fields(config)
    }


def from_tree(cls: type[T], tree: Any, *, where: str = "") -> T:
    """Build a ``cls`` from what :func:`to_tree` returned; missing keys take the class's defaults.

    Args:
        cls: the dataclass at the root of the tree.
        tree: nested dictionaries as read from JSON.
        where: dotted path of this node, used in messages.

    Raises:
        ValueError: a key is unknown (the nearest known key is named) or missing, or a component refuses its values.
        TypeError: a value has another type than its field declares.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Sizes:
    ...     dim: int = 8
    >>> from_tree(Sizes, {"dmi": 9})
    Traceback (most recent call last):
    ...
    ValueError: unknown key 'dmi'; did you mean 'dim'?
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"{where or 'the configuration'} must be an object with keys, got {_came(tree)}")
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls)) if field.init}
    for key in tree:
        if key not in fields:
            close = nearest(str(key), fields)
            hint = f"; did you mean {_join(where, close)!r}?" if close else f"; known: {', '.join(fields)}"
            raise ValueError(f"unknown key {_join(where, key)!r}{hint}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _decode(_join(where, name), tree[name], hints[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_join(where, name)} is missing and has no default")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        if not where:
            raise
        raise type(error)(f"{where}: {error}") from error


def dumps(config: Any) -> str:
    """Return the configuration as indented JSON text with a final newline."""
    return json.dumps(to_tree(config), indent=2, allow_nan=False) + "\n"


def loads(cls: type[T], text: str, *, name: str = "config.json") -> T:
    """Read a ``cls`` from JSON text; ``name`` is what messages call the text.

    Raises:
        ValueError: the text is no JSON, or the tree is refused by :func:`from_tree`.
        TypeError: a value has another type than its field declares.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    return from_tree(cls, tree)


def leaves(tree: Any, where: str = "") -> dict[str, Any]:
    """Return every leaf of a configuration (or of its tree) under its dotted path.

    >>> leaves({"model": {"dim": 8, "heads": [1, 2]}, "seed": 0})
    {'model.dim': 8, 'model.heads': [1, 2], 'seed': 0}
    """
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = to_tree(tree)
    if not isinstance(tree, Mapping) or (where and not tree):
        return {where: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(leaves(value, _join(where, key)))
    return found


def differences(first: Any, second: Any) -> list[str]:
    """Return one line for every leaf in which two configurations (or their trees) differ, sorted by path.

    >>> differences({"optim": {"lr": 0.02}, "seed": 0}, {"optim": {"lr": 0.01}, "seed": 0})
    ['optim.lr: 0.02 and 0.01']
    """
    left, right = leaves(first), leaves(second)
    absent = "(absent)"
    return [
        f"{key}: {json.dumps(left[key]) if key in left else absent} and "
        f"{json.dumps(right[key]) if key in right else absent}"
        for key in sorted(left.keys() | right.keys())
        if key not in left or key not in right or left[key] != right[key]
    ]


def fingerprint(config: Any) -> str:
    """Return the SHA-256 (hexadecimal) of the configuration's canonical JSON: equal exactly when the trees are.

    >>> fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
    True
    """
    tree = to_tree(config) if dataclasses.is_dataclass(config) else config
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _came(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _is_open(hint: Any) -> bool:
    return hint is Any or hint is object


def _members(hint: Any) -> Iterator[Any]:
    """The members of a union, flattened; a hint that is no union is its own only member."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _members(member)
    else:
        yield hint


def _dataclasses_of(hint: Any) -> dict[str, type]:
    return {m.__name__: m for m in _members(hint) if isinstance(m, type) and dataclasses.is_dataclass(m)}


def _encode(where: str, value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree = to_tree(value)
        cls = type(value)
        if _is_open(hint):
            return {"type": f"{cls.__module__}:{cls.__qualname__}", **tree}
        return {"type": cls.__name__, **tree} if len(_dataclasses_of(hint)) > 1 else tree
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite to be written as JSON, got {value!r}")
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, (tuple, list)):
        inner = _element_hints(hint, len(value))
        return [_encode(f"{where}[{i}]", item, inner[i]) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _encode(_join(where, key), item, Any) for key, item in value.items()}
    raise TypeError(f"{where} must be a plain value, a tuple, a dict or a dataclass, got {_came(value)}")


def _element_hints(hint: Any, length: int) -> list[Any]:
    for member in _members(hint):
        origin, args = typing.get_origin(member), typing.get_args(member)
        if origin is list and args:
            return [args[0]] * length
        if origin is tuple and args:
            if len(args) == 2 and args[1] is Ellipsis:
                return [args[0]] * length
            if len(args) == length:
                return list(args)
    return [Any] * length


def _decode(where: str, value: Any, hint: Any) -> Any:
    if _is_open(hint):
        return _decode_open(where, value)
    members = list(_members(hint))
    classes = _dataclasses_of(hint)
    if classes and isinstance(value, Mapping):
        if len(classes) == 1:
            return from_tree(next(iter(classes.values())), value, where=where)
        return _decode_tagged(where, value, classes)
    for member in members:
        accepted, result = _try_member(where, value, member)
        if accepted:
            return result
    raise TypeError(f"{where} must be {' or '.join(_name(m) for m in members)}, got {_came(value)}")


def _decode_tagged(where: str, value: Mapping[str, Any], classes: Mapping[str, type]) -> Any:
    rest = {key: item for key, item in value.items() if key != "type"}
    tag = value.get("type")
    if not isinstance(tag, str) or tag not in classes:
        close = nearest(tag, classes) if isinstance(tag, str) else None
        hint = f"; did you mean {close!r}?" if close else ""
        raise ValueError(f"{where}.type must be one of {', '.join(map(repr, classes))}, got {tag!r}{hint}")
    return from_tree(classes[tag], rest, where=where)


def _decode_open(where: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return tuple(_decode_open(where, item) for item in value) if isinstance(value, list) else value
    tag = value.get("type")
    if tag is None:
        return {key: _decode_open(_join(where, key), item) for key, item in value.items()}
    module_name, _, class_name = str(tag).partition(":")
    package = __name__.partition(".")[0]
    if module_name not in sys.modules:
        if module_name.partition(".")[0] != package:
            raise ValueError(f"{where}.type names {tag!r}: import {module_name!r} yourself before this is read")
        try:
            importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{where}.type names {tag!r}, and there is no module {module_name!r}") from error
    cls = getattr(sys.modules[module_name], class_name, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"{where}.type names {tag!r}, which is no dataclass of {module_name}")
    return from_tree(cls, {key: item for key, item in value.items() if key != "type"}, where=where)


def _try_member(where: str, value: Any, member: Any) -> tuple[bool, Any]:
    """Whether ``value`` fits ``member`` of a union, and what it becomes there."""
    origin, args = typing.get_origin(member), typing.get_args(member)
    if member is None or member is type(None):
        return value is None, None
    if origin is typing.Literal:
        same = [a for a in args if a == value and isinstance(a, bool) == isinstance(value, bool)]
        return bool(same), value
    if member is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return fits, value  # an integer stays one: a span of 100 steps is not a fraction of 100.0
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if member in (bool, str):
        return isinstance(value, member), value
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis) and len(args) != len(value):
            raise ValueError(f"{where} must have {len(args)} values, got {len(value)}")
        inner = _element_hints(member, len(value))
        return True, origin(_decode(f"{where}[{i}]", item, inner[i]) for i, item in enumerate(value))
    if (origin is dict or member is dict) and isinstance(value, Mapping):
        inner_hint = args[1] if len(args) == 2 else Any
        return True, {key: _decode(_join(where, key), item, inner_hint) for key, item in value.items()}
    return False, None


def _name(member: Any) -> str:
    if member is None or member is type(None):
        return "null"
    if typing.get_origin(member) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(member)))
    return str(member) if typing.get_origin(member) else getattr(member, "__name__", str(member))
