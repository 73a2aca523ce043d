"""Argument checks shared by every package: one sentence that names the argument, what came and what is accepted."""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate spelled most like ``name``, or None if none comes close.

    >>> nearest("poler_express", ["polar_express", "jordan"])
    'polar_express'
    """
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return found[0] if found else None


def choice(name: str, value: Any, accepted: Sequence[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``accepted``; the nearest accepted string is suggested.

    >>> choice("gate", "sigmod", ["sigmoid", "softmax"])
    Traceback (most recent call last):
    ...
    ValueError: gate must be one of 'sigmoid', 'softmax', got 'sigmod'; did you mean 'sigmoid'?
    """
    if value in accepted:
        return
    close = nearest(value, [a for a in accepted if isinstance(a, str)]) if isinstance(value, str) else None
    hint = f"; did you mean {close!r}?" if close else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}{hint}")


def literals(config: Any) -> None:
    """Raise ValueError unless every field of a dataclass that is declared as a ``Literal`` holds one of its values.

    >>> @dataclasses.dataclass
    ... class Loss:
    ...     reduction: Literal["mean", "sum"] = "mean"
    >>> literals(Loss(reduction="summ"))
    Traceback (most recent call last):
    ...
    ValueError: reduction must be one of 'mean', 'sum', got 'summ'; did you mean 'sum'?
    """
    for name, accepted in _literals(config.__class__):
        choice(name, getattr(config, name), accepted)


@functools.cache
def _literals(cls: type) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """The fields of a dataclass that are declared as literals (or None), with the accepted values."""
    hints, found = typing.get_type_hints(cls), list[tuple[str, tuple[Any, ...]]]()
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        # `Literal[1] | None` is a typing.Union where `int | None` is a types.UnionType.
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        members = typing.get_args(hint) if union else (hint,)
        literal = [value for member in members if typing.get_origin(member) is Literal for value in member.__args__]
        if literal and all(typing.get_origin(m) is Literal or m is types.NoneType for m in members):
            found.append((field.name, (*literal, *([None] if types.NoneType in members else []))))
    return tuple(found)


def number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise unless ``value`` is a finite real number in the interval from ``low`` to ``high``.

    >>> number("momentum", 1.0, low=0, high=1, high_open=True)
    Traceback (most recent call last):
    ...
    ValueError: momentum must be in [0, 1), got 1.0
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    inside = -math.inf < value < math.inf and low <= value <= high
    if inside and not (low_open and value == low) and not (high_open and value == high):
        return
    if math.isinf(low) and math.isinf(high):
        raise ValueError(f"{name} must be finite, got {value!r}")
    left = "(" if low_open or math.isinf(low) else "["
    right = ")" if high_open or math.isinf(high) else "]"
    raise ValueError(f"{name} must be in {left}{low}, {high}{right}, got {value!r}")


def positive(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number above zero."""
    number(name, value, low=0, low_open=True)


def integer(name: str, value: Any, *, low: int = 1, high: int | None = None) -> None:
    """Raise unless ``value`` is an integer from ``low`` to ``high``.

    >>> integer("heads", 0)
    Traceback (most recent call last):
    ...
    ValueError: heads must be an integer of at least 1, got 0
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < low or (high is not None and value > high):
        reach = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be an integer {reach}, got {value!r}")
