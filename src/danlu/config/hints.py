"""What the declaration of a field accepts: its union's members, and the components that it knows by name."""

import dataclasses
import functools
import importlib
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from danlu.config.migrations import MOVED

__all__ = ["IsPath", "Known", "Place", "hints_of", "members", "place", "short_name", "tag_of"]


@dataclass(frozen=True)
class Known:
    """Marker of an open place: the components of ``package`` are known by their names there.

    ``optim: Annotated[OptimizerConfig, Known("danlu.optim")]`` accepts any dataclass with the protocol's methods; those
    that danlu.optim's modules define are written ``"MuonConfig"`` and chosen on the command line by ``muon``.
    """

    package: str


@dataclass(frozen=True)
class IsPath:
    """Marker of a field that holds paths: the command line makes them absolute."""


@dataclass(frozen=True)
class Place:
    """What a field accepts.

    Attributes:
        plain: the types that are neither dataclasses nor open.
        classes: the dataclasses of its union, by class name.
        protocol: the protocol (or Any) that makes the place open; None for one that is closed.
        package: the package whose components are known by name; None for none.
        is_path: whether its text is a path.
    """

    plain: tuple[Any, ...]
    classes: dict[str, type]
    protocol: Any
    package: str | None
    is_path: bool

    @property
    def tagged(self) -> bool:
        """Whether an object here says of which class it is."""
        return self.protocol is not None or len(self.classes) > 1

    @property
    def section(self) -> bool:
        """Whether a dataclass may stand here."""
        return bool(self.classes) or self.protocol is not None

    def known(self) -> dict[str, type]:
        """Return every class that is known by name here: the union's, then the package's."""
        return self.classes | (_components(self.package, self.protocol) if self.package else {})

    def find(self, name: str) -> type | None:
        """Return the class of that name (or that short name) if it is known here.

        >>> from danlu.optim import schedules
        >>> place(schedules.Constant | schedules.Cosine).find("cosine").__name__
        'Cosine'
        """
        wanted = _plain(name)
        for cls_name, cls in self.known().items():
            if wanted in (_plain(cls_name), _plain(short_name(cls))):
                return cls
        return None

    def admits(self, cls: type) -> bool:
        """Whether an object of this dataclass may stand here."""
        return cls in self.classes.values() or (self.protocol is not None and not missing_methods(cls, self.protocol))


def place(hint: Any) -> Place:
    """Return what a field declared as ``hint`` accepts."""
    plain, classes, protocol, package, is_path = list[Any](), dict[str, type](), None, None, False
    for member, markers in _marked(hint, ()):
        package = next((marker.package for marker in markers if isinstance(marker, Known)), package)
        is_path = is_path or any(isinstance(marker, IsPath) for marker in markers)
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            classes[member.__name__] = member
        elif member in (Any, object) or getattr(member, "_is_protocol", False):
            protocol = member
        else:
            plain.append(member)
    return Place(tuple(plain), classes, protocol, package, is_path)


def members(hint: Any) -> list[Any]:
    """Return the members of a union, flattened and without markers; another hint is its own only member."""
    return [member for member, _ in _marked(hint, ())]


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Return the declared type of every field of a dataclass, with its markers."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cast(Any, cls))}


def short_name(cls: type) -> str:
    """Return the name by which the command line chooses a component.

    >>> [short_name(type(name, (), {})) for name in ("GQAConfig", "WarmupStableDecay", "CausalLMConfig", "AdamWConfig")]
    ['gqa', 'warmup-stable-decay', 'causal-lm', 'adamw']
    """
    name = cls.__name__.removesuffix("Config")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][A-Za-z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def tag_of(cls: type, where: Place) -> str:
    """Return what is written under ``"type"`` for an object of ``cls``.

    Raises:
        ValueError: no import finds the class under its name, so that what is written could not be read.
    """
    own = where.package is not None and f"{cls.__module__}.".startswith(f"{where.package}.")
    if own or cls in where.classes.values():
        return cls.__name__
    inside = cls.__qualname__.rpartition(".")[0]
    if inside or cls.__module__ == "__main__":
        place_of_it = f"inside {inside.removesuffix('.<locals>')}" if inside else "in the script that is run (__main__)"
        raise ValueError(
            f"class {cls.__name__} is defined {place_of_it}, where a saved configuration cannot find it again: "
            "define it at the top level of a file that is imported, such as my_recipe.py"
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def loaded_class(tag: str, path: str) -> type:
    """Return the dataclass that ``module:Class`` names, of danlu or of a module that has been imported already.

    Raises:
        ValueError: there is none, or its module is foreign and has not been imported.
    """
    module_name, _, class_name = MOVED.get(tag, tag).partition(":")
    package = __name__.partition(".")[0]
    if module_name not in sys.modules:
        if module_name.partition(".")[0] != package:
            raise ValueError(
                f"{path}.type names {tag!r}: import {module_name!r} yourself before this is read "
                "(on the command line: --code FILE_OR_MODULE)"
            )
        try:
            importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{path}.type names {tag!r}, and there is no module {module_name!r}") from error
    found = getattr(sys.modules[module_name], class_name, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"{path}.type names {tag!r}, which is no dataclass of {module_name}")
    return cast(type, found)


def missing_methods(cls: type, protocol: Any) -> list[str]:
    """Return the methods of a protocol that ``cls`` lacks."""
    wanted = [name for name, value in vars(protocol).items() if callable(value) and not name.startswith("_")]
    return [] if protocol in (Any, object) else [name for name in wanted if not callable(getattr(cls, name, None))]


def _marked(hint: Any, markers: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from _marked(hint.__origin__, (*markers, *hint.__metadata__))
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _marked(member, markers)
    else:
        yield hint, markers


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


@functools.cache
def _components(package: str, protocol: Any) -> dict[str, type]:
    """The dataclasses with the protocol's methods that the public modules of a package define, by class name."""
    found: dict[str, type] = {}
    waiting = [package]
    while waiting:
        module = importlib.import_module(waiting.pop(0))
        found |= {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, type)
            and dataclasses.is_dataclass(value)
            and value.__module__ == module.__name__
            and not name.startswith("_")
            and not missing_methods(value, protocol)
        }
        names = [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", ()))]
        waiting += [f"{module.__name__}.{name}" for name in names if not name.startswith("_")]
    return found
