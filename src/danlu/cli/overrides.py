"""Options of a configuration set by their paths (``--model.dim 512``), and its components chosen by name."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, cast

from danlu._validate import nearest
from danlu.cli.values import accepted, is_none, parse, words_of
from danlu.config import Draft, absolute_paths, describe, place, short_name
from danlu.config.draft import Spot, element
from danlu.config.hints import loaded_class, missing_methods
from danlu.config.tree import new_names

__all__ = ["COMMON", "apply", "change", "kind_name", "one_length", "options", "settable", "values"]

T = TypeVar("T")
Find = Callable[[str], type]

COMMON = {
    "steps": "train.steps",
    "minutes": "train.minutes",
    "seed": "train.seed",
    "lr": "optim.lr",
    "batch": "data.batch",
    "batch_size": "data.batch",
}
"""Short names of options that every training program has."""

# The length of a run in steps or in minutes: to give one is to take back the recipe's other.
_LENGTHS = ("train.steps", "train.minutes")
_NUMBER = re.compile(r"-\d|-\.\d|-inf")


def values(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every option of a configuration that is no section.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Model:
    ...     dim: int = 8
    >>> @dataclass(frozen=True)
    ... class Run:
    ...     model: Model = Model()
    ...     steps: int = 3
    >>> list(values(Run()))
    [('model.dim', 8), ('steps', 3)]
    """
    yield from ((spot.path, spot.value) for spot in settable(Draft.of(config)) if not _is_section(spot))


def settable(draft: Draft, fixed: Sequence[str] = ()) -> list[Spot]:
    """Return every option that can be set: values, and places where a component is chosen by name."""
    return [spot for spot in draft.spots() if spot.path not in fixed and (not _is_section(spot) or _is_choice(spot))]


def options(config: Any, fixed: Sequence[str] = ()) -> Iterator[list[str]]:
    """Yield the words that set each option to the value it has, components before what belongs to them."""
    for spot in settable(Draft.of(config), fixed):
        if not _is_section(spot):
            yield [f"--{spot.path}", *words_of(spot.value)]
        elif element(spot.hint) is not None:
            yield [f"--{spot.path}", *(kind_name(item, element(spot.hint)) for item in spot.value)]
        elif not spot.path.rpartition(".")[2].isdigit():
            yield [f"--{spot.path}", kind_name(spot.value, spot.hint)]


def apply(config: T, words: Sequence[str], *, fixed: Sequence[str] = (), find: Find | None = None) -> T:
    """Return ``config`` with the options named in ``words`` replaced.

    The order of the options does not matter: components are chosen first, then their options are set. A component of
    another class starts from its own defaults.

    Args:
        config: a tree of frozen dataclasses.
        words: alternately ``--path.to.option`` and its value or values, or ``--path.to.option=value``.
        fixed: paths that cannot be set.
        find: returns the class that ``module:Class`` or ``file.py:Class`` names; None for those of danlu and of
            modules that have been imported.

    Raises:
        ValueError: an unknown path or name (the nearest one is given), a value of another type, or one that its class
            rejects.
    """
    draft = Draft.of(config)
    change(draft, words, fixed=fixed, find=find)
    return cast(T, absolute_paths(draft.build()))


def change(draft: Draft, words: Sequence[str], *, fixed: Sequence[str] = (), find: Find | None = None) -> list[str]:
    """Apply ``words`` to a draft as :func:`apply` does; return a sentence for every old name that was used."""
    said, named = list[str](), dict[str, str]()
    pairs = [(name if name in draft.values else COMMON.get(name, name), values) for name, values in _pairs(words)]
    for name, values in sorted(pairs, key=lambda pair: pair[0].count(".")):
        path, old = draft.today(name)
        said += old
        if named.setdefault(path, name) != name:
            earlier = name if old else named[path]
            raise ValueError(f"--{earlier} is the old name of --{path}, and both are given")
        found = {spot.path: spot for spot in draft.spots() if spot.path not in fixed}
        if path not in found:
            _unknown(path, found)
        spot, option = found[path], f"--{path}"
        if not _is_section(spot):
            draft.set(path, parse(values, spot.hint, option))
        elif not _is_choice(spot):
            inside = [f"--{inner}" for inner, other in found.items() if inner.startswith(f"{path}.")]
            raise ValueError(f"--{path} is a section; set one of its options: {', '.join(inside)}")
        else:
            _choose(draft, spot, values, option, find)
    one_length(draft, named)
    return said


def one_length(draft: Draft, named: Collection[str]) -> None:
    """Take back the recipe's steps where minutes were given without steps, and the other way round.

    Args:
        draft: after the changes.
        named: the paths that were changed.
    """
    held = {spot.path: spot.value for spot in draft.spots() if spot.path in _LENGTHS}
    for given, other in (_LENGTHS, _LENGTHS[::-1]):
        if given in named and held.get(given) is not None and other in held and other not in named:
            draft.set(other, None)


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each option's path and the words that follow it."""
    pairs: list[tuple[str, list[str]]] = []
    for word in words:
        if is_option(word):
            name, equals, value = word.removeprefix("--").partition("=")
            # Hyphens are taken for underscores, as command lines often have them.
            pairs.append((name.replace("-", "_"), [value] if equals else []))
        elif not pairs:
            raise ValueError(f"{word!r} belongs to no option")
        else:
            pairs[-1][1].append(word)
    yield from pairs


def is_option(word: str) -> bool:
    """Whether a word begins an option; negative numbers do not.

    >>> is_option("--train.steps"), is_option("-0.5"), is_option("lm")
    (True, False, False)
    """
    return word.startswith("-") and not _NUMBER.match(word) and word != "-"


def _is_section(spot: Spot) -> bool:
    """Whether a component stands here, or may: then there is no one value to set."""
    if isinstance(spot.value, Draft) or element(spot.hint) is not None:
        return True
    where = place(spot.hint)
    return bool(where.classes) or (where.protocol not in (None, Any, object))


def _is_choice(spot: Spot) -> bool:
    """Whether there is something to choose in a section: another class, or none."""
    hint = element(spot.hint) or spot.hint
    where = place(hint)
    return where.tagged or type(None) in where.plain


def kind_name(value: Draft | None, hint: Any) -> str:
    """Return the word that chooses the component that stands in a place."""
    if value is None:
        return "none"
    name = short_name(value.cls)
    return name if place(hint).find(name) is value.cls else f"{value.cls.__module__}:{value.cls.__name__}"


def _choose(draft: Draft, spot: Spot, names: Sequence[str], option: str, find: Find | None) -> None:
    inner = element(spot.hint)
    if inner is None:
        if len(names) != 1:
            what = f"{names[1]!r} belongs to no option" if names else "none is given"
            raise ValueError(f"{option} takes 1 name ({accepted(spot.hint)}): {what}")
        draft.set(spot.path, _component(spot.value, names[0], spot.hint, option, find))
        return
    listed = names[0].split(",") if len(names) == 1 else names
    held = spot.value if isinstance(spot.value, tuple) else ()
    items = [held[i] if i < len(held) else None for i in range(len(listed))]
    pairs = zip(items, listed, strict=True)
    draft.set(spot.path, tuple(_component(item, name, inner, option, find) for item, name in pairs))


def _component(held: Any, name: str, hint: Any, option: str, find: Find | None) -> Draft | None:
    """The component called ``name``: the one that stands there if it is of this class, else a new one."""
    where = place(hint)
    if is_none(name) and type(None) in where.plain:
        return None
    cls = where.find(name)
    if cls is None and ":" in name and where.protocol is not None:
        cls = loaded_class(name, option) if find is None else find(name)
        lacking = missing_methods(cls, where.protocol)
        if lacking:
            raise ValueError(f"{option}: {name} has no method {' or '.join(lacking)}")
    if cls is None:
        known = [short_name(known) for known in where.known().values()]
        close = nearest(name.lower(), known)
        did = _spelled_out(name, where.known().values()) or (f"; did you mean {close!r}?" if close else "")
        raise ValueError(f"{option} must be {accepted(hint)}, got {name!r}{did}")
    return held if isinstance(held, Draft) and held.cls is cls else Draft(cls, {})


def _spelled_out(name: str, classes: Iterable[type]) -> str:
    """Suggest the component of which a field's description has what a name such as mha or mqa abbreviates."""
    letters = name.lower().removesuffix("a")  # the a is for attention
    if not letters.isalpha() or len(letters) < 2:
        return ""
    phrase = re.compile(r"\b" + r"\w*-".join(letters), re.IGNORECASE)
    for cls in classes:
        for field, text in describe(cls).items():
            if phrase.search(text):
                return f"; did you mean {short_name(cls)!r}? Its {field}: {text}"
    return ""


def _old_names(spot: Spot) -> list[str]:
    """The names that an option had before."""
    owner, name = spot.doc
    return [old for old, new in new_names(owner).items() if new == name]


def _unknown(path: str, found: dict[str, Spot]) -> NoReturn:
    """Say that there is no such option here, and where the one meant may be."""
    if path.rpartition(".")[2] == "epochs":
        raise ValueError(
            "there are no epochs: set --train.steps (the plan says how many passes over the data they are)"
        )
    section, _, name = path.rpartition(".")
    while section and section not in found:
        section, _, inner = section.rpartition(".")
        name = f"{inner}.{name}"
    last = path.rpartition(".")[2]
    # People remember an option's name better than its section, and may remember the name that it had.
    same = [other for other, there in found.items() if last in (other.rpartition(".")[2], *_old_names(there))]
    spot = found.get(section)
    if spot is not None and spot.value is None and _is_section(spot):
        first = next(iter(place(spot.hint).known().values()), None)
        choose = f": choose one, such as --{section} {short_name(first)}" if first else ""
        raise ValueError(f"--{path}: there is no {section} here{choose}")
    if spot is not None and isinstance(spot.value, Draft):
        owners = [cls for cls in place(spot.hint).known().values() if name in getattr(cls, "__dataclass_fields__", {})]
        if owners and not any(other.startswith(f"{section}.") for other in same):
            raise ValueError(
                f"--{path}: {section} is {short_name(spot.value.cls)} here, which has no {name}; "
                f"it belongs to --{section} {' or '.join(map(short_name, owners))}"
            )
    close = same or [match for match in [nearest(path, found) if section else None] if match]
    if not close:
        by_name = nearest(last, {other.rpartition(".")[2] for other in found})
        close = [other for other in found if other.rpartition(".")[2] == by_name]
    hint = f"; did you mean {' or '.join(f'--{other}' for other in close[:3])}?" if close else ""
    raise ValueError(f"there is no option --{path}{hint or '; `danlu show RECIPE` lists them all'}")
