"""All options of a configuration for people to read: type, default and meaning, in columns, by section."""

import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from danlu.cli.overrides import kind_name, settable
from danlu.cli.source import FIXED
from danlu.cli.values import accepted, words_of
from danlu.config import Draft, describe
from danlu.config.draft import Spot, element

__all__ = ["table"]

_WIDEST = 36
_ROLE = re.compile(r":[a-z:]+:`(?:~(?:\w+\.)*)?([^`]*)`")


def table(config: Any) -> Iterator[str]:
    """Yield the lines of the list: a section's name and class, then its options."""
    draft = Draft.of(config)
    sections = {spot.path: spot.value for spot in draft.spots() if isinstance(spot.value, Draft)}
    rows: dict[str, list[tuple[str, str, str, str]]] = {}
    for spot in settable(draft, FIXED):
        if spot.path.rpartition(".")[2].isdigit() and spot.value is None:
            continue
        parent = spot.path.rpartition(".")[0]
        while parent and parent not in sections:
            parent = parent.rpartition(".")[0]
        rows.setdefault(parent, []).append(_row(spot))
    every = [row for section in rows.values() for row in section]
    widths = [max(len(row[column]) for row in every) for column in range(3)]
    widths[1:] = [min(width, _WIDEST) for width in widths[1:]]
    for path, section in rows.items():
        held = sections.get(path)
        yield f"{path}: {_heading(held.cls)}" if held else path or "components"
        for row in section:
            yield from _lines(row, widths)
        yield ""


def _row(spot: Spot) -> tuple[str, str, str, str]:
    owner, name = spot.doc
    several = element(spot.hint)
    kinds = accepted(spot.hint) if several is None else f"{accepted(several)} ..."
    return f"--{spot.path}", kinds, _default(spot), _plain(describe(owner).get(name, ""))


def _heading(cls: type) -> str:
    """A class's name, and what it is if it says so (a dataclass that says nothing is given its signature)."""
    first = (cls.__doc__ or "").partition("\n")[0]
    return (
        f"{cls.__name__}." if not first or first.startswith(f"{cls.__name__}(") else f"{cls.__name__}. {_plain(first)}"
    )


def _plain(text: str) -> str:
    """A docstring's text without its markup.

    >>> _plain("as in :func:`danlu.approx.published`, :class:`~danlu.optim.Muon` or ``auto``")
    'as in danlu.approx.published, Muon or auto'
    """
    return _ROLE.sub(r"\1", text).replace("`", "")


def _default(spot: Spot) -> str:
    value = spot.value
    if isinstance(value, Draft):
        return kind_name(value, spot.hint)
    if element(spot.hint) is not None and isinstance(value, tuple):
        return ",".join(kind_name(item, element(spot.hint)) for item in value)
    return ",".join(words_of(value)) or "()"


def _lines(row: tuple[str, str, str, str], widths: list[int]) -> Iterator[str]:
    """One option; columns that are too wide push the rest to the next line."""
    total = max(shutil.get_terminal_size(fallback=(180, 24)).columns, 100)
    *cells, meaning = row
    lines, line = [], " "
    at = 1
    for cell, width in zip(cells, widths, strict=True):
        line = f"{line:{at}} {cell}"
        at += width + 2
        if len(line) >= at:
            lines.append(line)
            line = ""
    room = max(total - at - 1, 30)
    for part in textwrap.wrap(meaning, room) or [""]:
        lines.append(f"{line:{at}} {part}".rstrip())
        line = ""
    yield from (text for text in lines if text.strip())
