"""Words of the command line as values of a configuration's options, by the type that the option declares."""

import json
import math
import typing
from collections.abc import Sequence
from typing import Any

from danlu._validate import nearest
from danlu.config import Place, place, short_name
from danlu.config.tree import Reader

__all__ = ["accepted", "is_none", "parse", "words_of"]

_NONE = ("none", "null")
_TRUTH = {"true": True, "false": False}


def is_none(word: str) -> bool:
    """Whether a word stands for None.

    >>> is_none("None"), is_none("null"), is_none("nothing")
    (True, True, False)
    """
    return word.lower() in _NONE


def parse(words: Sequence[str], hint: Any, option: str) -> Any:
    """Return the value that ``words`` give to an option declared as ``hint``.

    Args:
        words: one, or several for a tuple; the items of a tuple may also stand in one word, separated by commas.
        hint: the declared type.
        option: its name, for messages.

    Raises:
        ValueError: the words are no value of this type; the message says what is accepted.

    >>> parse(["0.9,0.95"], tuple[float, float], "--betas")
    (0.9, 0.95)
    >>> parse(["NULL"], int | None, "--steps") is None
    True
    """
    spot = place(hint)
    items = [member for member in spot.plain if typing.get_origin(member) in (tuple, list)]
    if items and not (len(words) == 1 and type(None) in spot.plain and is_none(words[0])):
        return _several(words, items[0], spot, option)
    if not words:
        raise ValueError(f"{option} takes 1 value ({accepted(hint)}), none is given")
    if len(words) > 1:
        raise ValueError(f"{option} takes 1 value ({accepted(hint)}), so {words[1]!r} belongs to no option")
    return _one(words[0], spot, option)


def accepted(hint: Any) -> str:
    """Return what an option accepts, in few words.

    >>> accepted(int | None), accepted(tuple[float, float]), accepted(typing.Literal["a", "b"])
    ('int|none', 'float,float', 'a|b')
    """
    spot = place(hint)
    parts = [_accepted(member, spot) for member in sorted(spot.plain, key=lambda member: member is type(None))]
    if spot.section:
        parts = [*map(short_name, spot.known().values()), *parts]
        if spot.protocol is not None:
            parts.append("module:Class")
    return "|".join(parts)


def words_of(value: Any) -> list[str]:
    """Return the words that :func:`parse` reads as ``value``."""
    if isinstance(value, (tuple, list)):
        nested = any(isinstance(item, (tuple, list, dict)) for item in value)
        return [json.dumps(value)] if nested else [_word(item) for item in value]
    return [json.dumps(value)] if isinstance(value, dict) else [_word(value)]


def _word(value: Any) -> str:
    return (
        {None: "none", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else str(value)
    )


def _several(words: Sequence[str], hint: Any, spot: Place, option: str) -> Any:
    kinds = typing.get_args(hint)
    if any(typing.get_origin(kind) in (tuple, list, dict) for kind in kinds):
        return _json(" ".join(words), hint, option)
    if len(words) == 1 and not spot.is_path:
        words = words[0].split(",")
    if (len(kinds) == 2 and kinds[1] is Ellipsis) or typing.get_origin(hint) is list:
        each = [kinds[0]] * len(words)
    elif len(words) != len(kinds):
        raise ValueError(f"{option} takes {len(kinds)} values ({_accepted(hint, spot)}), got {len(words)}")
    else:
        each = list(kinds)
    return tuple(_one(word, place(kind), option) for word, kind in zip(words, each, strict=True))


def _one(word: str, spot: Place, option: str) -> Any:
    """The narrowest type that fits wins: an integer before a number, a choice before a text."""
    members = spot.plain
    if type(None) in members and is_none(word):
        return None
    if bool in members and word.lower() in _TRUTH:
        return _TRUTH[word.lower()]
    for kind in (int, float):
        if kind in members:
            try:
                number = kind(word)
            except ValueError:
                continue
            if math.isfinite(number):
                return number
    choices = [value for member in members if typing.get_origin(member) is typing.Literal for value in member.__args__]
    for choice in choices:
        if word == str(choice):
            return choice
    if str in members:
        return word
    if spot.protocol is not None or any(typing.get_origin(member) is dict or member is dict for member in members):
        return _json(word, typing.Union[(*members, *([Any] if spot.protocol is not None else []))], option)
    close = nearest(word, map(str, choices))
    hint = f"; did you mean {close!r}?" if close else ""
    wanted = "|".join(_accepted(member, spot) for member in sorted(members, key=lambda member: member is type(None)))
    raise ValueError(f"{option} must be {wanted}, got {word!r}{hint}")


def _json(text: str, hint: Any, option: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if place(hint).protocol is not None:
            return text
        raise ValueError(f"{option} must be JSON such as [[1, 2], [3]], got {text!r} ({error})") from None
    return Reader().decode(option, value, hint)


def _accepted(member: Any, spot: Place) -> str:
    origin, args = typing.get_origin(member), typing.get_args(member)
    if member is type(None):
        return "none"
    if origin is typing.Literal:
        return "|".join(map(str, args))
    if origin in (tuple, list) and args:
        if args[-1] is Ellipsis or origin is list:
            return f"{_item(args[0], spot)} ..."
        return ",".join(_item(arg, spot) for arg in args)
    if member is bool:
        return "true|false"
    return ("path" if spot.is_path else "text") if member is str else str(getattr(member, "__name__", member))


def _item(hint: Any, spot: Place) -> str:
    inner = place(hint)
    return ("path" if spot.is_path else "text") if inner.plain == (str,) else accepted(hint)
