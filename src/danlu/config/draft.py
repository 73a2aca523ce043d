"""A configuration while it is edited: options are set one by one, and checked together when it is built."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from danlu.config.hints import hints_of, place
from danlu.config.tree import Reader, class_of, join, make, new_names

__all__ = ["Draft", "Spot"]


class Spot(NamedTuple):
    """One option or section of a draft.

    ``hint`` is its declared type, ``value`` what stands there (a :class:`Draft` for a section), ``doc`` the class and
    field that document it.
    """

    path: str
    value: Any
    hint: Any
    doc: tuple[type, str]


@dataclass
class Draft:
    """An editable copy of a tree of frozen dataclasses.

    What was not changed stays the object that it was. What was changed is built once, at the end: options that only
    fit together may be set in any order.

    >>> @dataclass(frozen=True)
    ... class Model:
    ...     dim: int = 8
    >>> @dataclass(frozen=True)
    ... class Run:
    ...     model: Model = Model()
    >>> draft = Draft.of(Run())
    >>> draft.set("model.dim", 16)
    >>> draft.build()
    Run(model=Model(dim=16))
    """

    cls: type
    values: dict[str, Any]
    origin: Any = None

    @classmethod
    def of(cls, config: Any) -> "Draft":
        """Return a draft of a configuration."""
        names = [field.name for field in dataclasses.fields(config) if field.init]
        return cls(type(config), {name: _opened(getattr(config, name)) for name in names}, config)

    def spots(self, where: str = "") -> Iterator[Spot]:
        """Yield every option and section, a section before what it holds."""
        for name, hint in _settable(self.cls).items():
            path, value = join(where, name), self.values.get(name, _default(self.cls, name))
            yield Spot(path, value, hint, (self.cls, name))
            if isinstance(value, Draft):
                yield from value.spots(path)
            elif isinstance(value, tuple) and element(hint) is not None:
                for index, item in enumerate(value):
                    yield Spot(f"{path}.{index}", item, element(hint), (self.cls, name))
                    if isinstance(item, Draft):
                        yield from item.spots(f"{path}.{index}")

    def set(self, path: str, value: Any) -> None:
        """Put ``value`` (a :class:`Draft` for a section) where ``path`` leads.

        Raises:
            KeyError: no section of this draft has such a field.
        """
        name, _, rest = path.partition(".")
        if name not in _settable(self.cls):
            raise KeyError(path)
        held = self.values.get(name, _default(self.cls, name))
        if isinstance(held, tuple) and rest:
            index, _, inside = rest.partition(".")
            if not index.isdigit() or int(index) >= len(held):
                raise KeyError(path)
            items = list(held)
            if inside:
                items[int(index)].set(inside, value)
            else:
                items[int(index)] = value
            value = tuple(items)
        elif rest:
            if not isinstance(held, Draft):
                raise KeyError(path)
            held.set(rest, value)
            value = held
        self.values[name] = value

    def overlay(self, tree: Mapping[str, Any], reader: Reader, where: str = "") -> None:
        """Change what a part of a configuration's tree names, and nothing else; another ``"type"`` starts afresh.

        Raises:
            ValueError, TypeError: as :func:`danlu.config.from_tree`.
        """
        hints = _settable(self.cls)
        for key, value in reader.renamed(self.cls, tree, where).items():
            if key not in hints:
                reader.read(self.cls, {key: value}, where)  # raises: it knows the nearest key
            path, spot = join(where, key), place(hints[key])
            held = self.values.get(key, _default(self.cls, key))
            if isinstance(held, Draft) and isinstance(value, Mapping):
                kind = class_of(value, spot, path) if spot.tagged and "type" in value else held.cls
                if kind is not held.cls:
                    held = Draft(kind, {})
                held.overlay({k: v for k, v in value.items() if k != "type"} if spot.tagged else value, reader, path)
                self.values[key] = held
            else:
                self.values[key] = _opened(reader.decode(path, value, hints[key]))

    def changed(self) -> bool:
        """Whether building gives another configuration than the draft was made of."""
        return self.origin is None or any(
            _changed(value, getattr(self.origin, name, None)) for name, value in self.values.items()
        )

    def build(self, where: str = "") -> Any:
        """Return the configuration.

        Raises:
            ValueError, TypeError: a class rejects its values (with the path), or needs one that was not given.
        """
        if not self.changed():
            return self.origin
        values = {name: _closed(value, join(where, name)) for name, value in self.values.items()}
        for field in dataclasses.fields(cast(Any, self.cls)):
            if field.init and field.name not in values and _default(self.cls, field.name) is dataclasses.MISSING:
                raise ValueError(f"{join(where, field.name)} is missing and has no default")
        return make(self.cls, values, where)

    def today(self, path: str) -> tuple[str, list[str]]:
        """Return a path with today's names of renamed fields, and what was replaced.

        >>> from typing import ClassVar
        >>> @dataclass(frozen=True)
        ... class Model:
        ...     num_heads: int = 8
        ...     renamed: ClassVar[dict[str, str]] = {"heads": "num_heads"}
        >>> Draft.of(Model()).today("heads")
        ('num_heads', ['heads is now num_heads'])
        """
        at: Any = self
        names, said = list[str](), list[str]()
        for name in path.split("."):
            if isinstance(at, Draft):
                now = new_names(at.cls).get(name, name)
                if now != name:
                    said.append(f"{'.'.join([*names, name])} is now {now}")
                name, at = now, at.values.get(now, _default(at.cls, now))
            elif isinstance(at, tuple) and name.isdigit() and int(name) < len(at):
                at = at[int(name)]
            else:
                at = None
            names.append(name)
        return ".".join(names), said


def element(hint: Any) -> Any:
    """Return the declared type of the items of a tuple of sections, or None for another field."""
    for member in place(hint).plain:
        args = getattr(member, "__args__", ())
        if getattr(member, "__origin__", None) is tuple and args and place(args[0]).section:
            return args[0]
    return None


def _settable(cls: type) -> dict[str, Any]:
    """The declared types of the fields that a class is made with."""
    hints = hints_of(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cast(Any, cls)) if field.init}


def _default(cls: type, name: str) -> Any:
    field = next((field for field in dataclasses.fields(cast(Any, cls)) if field.name == name), None)
    if field is None:
        return dataclasses.MISSING
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return _opened(value)


def _opened(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return Draft.of(value)
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
        return tuple(map(_opened, value))
    return value


def _closed(value: Any, where: str) -> Any:
    if isinstance(value, Draft):
        return value.build(where)
    if isinstance(value, tuple) and any(isinstance(item, Draft) for item in value):
        return tuple(_closed(item, f"{where}.{index}") for index, item in enumerate(value))
    return value


def _changed(value: Any, origin: Any) -> bool:
    if isinstance(value, Draft):
        return value.origin is not origin or value.changed()
    if isinstance(value, tuple) and isinstance(origin, tuple) and len(value) == len(origin):
        return any(_changed(mine, theirs) for mine, theirs in zip(value, origin, strict=True))
    return bool(value is not origin)
