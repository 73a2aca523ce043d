"""Configurations to and from the trees of plain values that JSON holds."""

import dataclasses
import json
import logging
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from danlu._validate import nearest
from danlu.config.hints import Place, hints_of, loaded_class, members, missing_methods, place, tag_of
from danlu.config.migrations import FORMAT, migrate

__all__ = ["dumps", "from_document", "from_tree", "loads", "to_document", "to_tree"]

T = TypeVar("T")

_log = logging.getLogger("danlu.config")
_PLAIN = (bool, int, float, str)


def to_tree(config: Any) -> dict[str, Any]:
    """Return the configuration as nested dictionaries, lists and plain values, ready for JSON.

    Raises:
        TypeError: ``config`` is no dataclass, or an option is neither a plain value nor a tuple, list or dict of them.
        ValueError: an option is infinite or not a number, which JSON cannot hold, or the class of a component is
            defined where no import finds it: inside a function, or in ``__main__``.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Sizes:
    ...     dim: int = 8
    ...     ratios: tuple[float, ...] = (0.5, 2.0)
    >>> to_tree(Sizes())
    {'dim': 8, 'ratios': [0.5, 2.0]}
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config must be an instance of a dataclass, got {config!r} ({type(config).__name__})")
    hints = hints_of(type(config))
    return {
        field.name: _encode(field.name, getattr(config, field.name), hints[field.name])
        for field in dataclasses.fields(config)
    }


def from_tree(cls: type[T], tree: Any, *, where: str = "", quiet: bool = False) -> T:
    """Build a ``cls`` from what :func:`to_tree` returned; missing keys take the class's defaults.

    Keys under the old names of renamed fields are read, with one warning for all of them in the log ``danlu.config``.

    Args:
        cls: the dataclass at the root of the tree.
        tree: nested dictionaries as read from JSON.
        where: dotted path of this node, used in messages.
        quiet: do not warn.

    Raises:
        ValueError: a key is unknown (the nearest known key is named) or missing, or a component rejects its values.
        TypeError: a value has another type than its field declares.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Sizes:
    ...     dim: int = 8
    >>> from_tree(Sizes, {"dmi": 9})
    Traceback (most recent call last):
    ...
    ValueError: unknown key 'dmi'; did you mean 'dim'?
    """
    reader = Reader()
    config = reader.read(cls, tree, where)
    if not quiet:
        reader.warn()
    return config


def to_document(config: Any) -> dict[str, Any]:
    """Return :func:`to_tree` with the number of its format, which is what a file or a checkpoint keeps."""
    return {"format": FORMAT, **to_tree(config)}


def from_document(cls: type[T], document: Any, *, name: str = "config.json", quiet: bool = False) -> T:
    """Build a ``cls`` from what :func:`to_document` returned, now or in an earlier release.

    Args:
        cls: the dataclass at the root.
        document: as read from JSON.
        name: what messages call it.
        quiet: do not warn of old names.

    Raises:
        ValueError, TypeError: as :func:`from_tree`, or a format that this release does not know.
    """
    return from_tree(cls, migrate(document, name) if isinstance(document, Mapping) else document, quiet=quiet)


def dumps(config: Any) -> str:
    """Return the configuration and the number of its format as indented JSON text with a final newline."""
    return json.dumps(to_document(config), indent=2, allow_nan=False) + "\n"


def loads(cls: type[T], text: str, *, name: str = "config.json") -> T:
    """Read a ``cls`` from JSON text; ``name`` is what messages call the text.

    Raises:
        ValueError: the text is no JSON, or the tree is rejected by :func:`from_tree`.
        TypeError: a value has another type than its field declares.
    """
    return from_document(cls, parse(text, name), name=name)


def parse(text: str, name: str) -> Any:
    """Return what JSON text holds.

    Raises:
        ValueError: the text is no JSON; it is called ``name``.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error


def join(where: str, key: Any) -> str:
    """Return the dotted path of ``key`` inside ``where``."""
    return f"{where}.{key}" if where else str(key)


def new_names(cls: type) -> dict[str, str]:
    """Return the old names of a class's renamed fields with the names that they have now."""
    return dict(getattr(cls, "renamed", {}))


class Reader:
    """Builds configurations from trees and remembers which old names it met."""

    def __init__(self) -> None:
        self.old: list[str] = []

    def warn(self) -> None:
        """Log one sentence about the old names, if there were any."""
        if self.old:
            _log.warning("old names, read for one release: %s", "; ".join(self.old))

    def read(self, cls: type[T], tree: Any, where: str) -> T:
        """Build a ``cls`` from its tree."""
        if not isinstance(tree, Mapping):
            raise TypeError(f"{where or 'the configuration'} must be an object with keys, got {_came(tree)}")
        fields = {field.name: field for field in dataclasses.fields(cast(Any, cls)) if field.init}
        tree = self.renamed(cls, tree, where)
        for key in tree:
            if key not in fields:
                close = nearest(str(key), fields)
                hint = f"; did you mean {join(where, close)!r}?" if close else f"; known: {', '.join(fields)}"
                raise ValueError(f"unknown key {join(where, key)!r}{hint}")
        hints = hints_of(cast(type, cls))
        values = {}
        for name, field in fields.items():
            if name in tree:
                values[name] = self.decode(join(where, name), tree[name], hints[name])
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{join(where, name)} is missing and has no default")
        return make(cls, values, where)

    def renamed(self, cls: type, tree: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return a node with today's names for the keys of the class's renamed fields."""
        names = new_names(cls)
        for old in [key for key in tree if key in names]:
            if names[old] in tree:
                raise ValueError(f"{join(where, old)} is the old name of {names[old]}, and both are given")
            self.old.append(f"{join(where, old)} is now {names[old]}")
        return {names.get(key, key): value for key, value in tree.items()}

    def decode(self, where: str, value: Any, hint: Any) -> Any:
        """Read the value of a field declared as ``hint``."""
        spot = place(hint)
        if spot.section and isinstance(value, Mapping) and (spot.classes or "type" in value):
            if not spot.tagged:
                return self.read(next(iter(spot.classes.values())), value, where)
            return self.read(class_of(value, spot, where), {k: v for k, v in value.items() if k != "type"}, where)
        if spot.protocol in (Any, object):
            return self._anything(where, value)
        for member in spot.plain:
            accepted, result = self._member(where, value, member)
            if accepted:
                return result
        accepted_names = [*map(_name, spot.plain), *spot.classes]
        if spot.protocol is not None:
            accepted_names.append(f"an object with a type ({spot.protocol.__name__})")
        raise TypeError(f"{where} must be {' or '.join(accepted_names)}, got {_came(value)}")

    def _anything(self, where: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self.decode(join(where, key), item, Any) for key, item in value.items()}
        return tuple(self.decode(where, item, Any) for item in value) if isinstance(value, list) else value

    def _member(self, where: str, value: Any, member: Any) -> tuple[bool, Any]:
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
            return True, origin(self.decode(f"{where}[{i}]", item, inner[i]) for i, item in enumerate(value))
        if (origin is dict or member is dict) and isinstance(value, Mapping):
            inner_hint = args[1] if len(args) == 2 else Any
            return True, {key: self.decode(join(where, key), item, inner_hint) for key, item in value.items()}
        return False, None


def make(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Return ``cls(**values)``; what it rejects is said with its path."""
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        if not where:
            raise
        raise type(error)(f"{where}: {error}") from error


def class_of(value: Mapping[str, Any], spot: Place, where: str) -> type:
    """Return the class of an object in a place of several.

    Raises:
        ValueError: its ``"type"`` is missing, unknown or does not belong here.
    """
    tag = value.get("type")
    if tag is None and len(spot.classes) == 1:
        # Written when there was one class only.
        return next(iter(spot.classes.values()))
    if isinstance(tag, str):
        module, _, name = tag.rpartition(":")
        inside = not module or spot.package is None or module.startswith(spot.package)
        found = (spot.classes.get(name) or spot.known().get(name)) if inside else None
        if found is not None and (not module or spot.package is not None or found.__module__ == module):
            return found
        if module and spot.protocol is not None:
            found = loaded_class(tag, where)
            lacking = missing_methods(found, spot.protocol)
            if lacking:
                raise ValueError(f"{where}.type names {tag!r}, which has no method {' or '.join(lacking)}")
            return found
    known = spot.known()
    close = nearest(tag, known) if isinstance(tag, str) else None
    hint = f"; did you mean {close!r}?" if close else ""
    other = [] if spot.protocol is None else ["'module:Class'"]
    raise ValueError(f"{where}.type must be one of {', '.join([*map(repr, known), *other])}, got {tag!r}{hint}")


def _came(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _encode(where: str, value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree, spot = to_tree(value), place(hint)
        return {"type": tag_of(type(value), spot), **tree} if spot.tagged else tree
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite to be written as JSON, got {value!r}")
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, (tuple, list)):
        inner = _element_hints(hint, len(value))
        return [_encode(f"{where}[{i}]", item, inner[i]) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _encode(join(where, key), item, Any) for key, item in value.items()}
    raise TypeError(f"{where} must be a plain value, a tuple, a dict or a dataclass, got {_came(value)}")


def _element_hints(hint: Any, length: int) -> list[Any]:
    for member in members(hint):
        origin, args = typing.get_origin(member), typing.get_args(member)
        if origin is list and args:
            return [args[0]] * length
        if origin is tuple and args:
            if len(args) == 2 and args[1] is Ellipsis:
                return [args[0]] * length
            if len(args) == length:
                return list(args)
    return [Any] * length


def _name(member: Any) -> str:
    if member is None or member is type(None):
        return "null"
    if typing.get_origin(member) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(member)))
    return str(member) if typing.get_origin(member) else getattr(member, "__name__", str(member))
