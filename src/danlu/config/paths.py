"""The paths in a configuration: made absolute, and found again when a run and what it reads were moved together."""

import glob
import os
from collections.abc import Callable
from typing import Any, TypeVar

from danlu.config.draft import Draft
from danlu.config.hints import place

__all__ = ["absolute_paths", "moved_paths", "path_options"]

T = TypeVar("T")


def path_options(config: Any) -> list[str]:
    """Return the options of a configuration that hold paths (:class:`danlu.config.IsPath`)."""
    return [spot.path for spot in Draft.of(config).spots() if place(spot.hint).is_path]


def absolute_paths(config: T) -> T:
    """Return ``config`` with its relative paths made absolute, from the current folder.

    >>> from dataclasses import dataclass
    >>> from typing import Annotated
    >>> from danlu.config import IsPath
    >>> @dataclass(frozen=True)
    ... class Reads:
    ...     path: Annotated[tuple[str, ...] | None, IsPath()] = None
    >>> absolute_paths(Reads(path=("/data/a.txt", "b"))).path[1] == os.path.abspath("b")
    True
    """
    return _replaced(config, lambda path: os.path.abspath(os.path.expanduser(path)))


def moved_paths(config: T, old: str, new: str) -> T:
    """Return ``config`` with what is no longer at its place looked for where it would be if ``old`` became ``new``.

    Args:
        config: whose paths may be out of date.
        old: absolute path of a folder, as it was when the paths were written.
        new: what that folder is called now. A path that leads to nothing from here either stays as it is.
    """

    def found(path: str) -> str:
        there = os.path.normpath(os.path.join(new, os.path.relpath(path, old)))
        return path if _exists(path) or not _exists(there) else there

    return config if old == new else _replaced(config, found)


def _exists(path: str) -> bool:
    return os.path.exists(path) or (glob.has_magic(path) and bool(glob.glob(path, recursive=True)))


def _replaced(config: T, change: Callable[[str], str]) -> T:
    draft = Draft.of(config)
    for spot in list(draft.spots()):
        if not place(spot.hint).is_path:
            continue
        if isinstance(spot.value, str):
            draft.set(spot.path, change(spot.value))
        elif isinstance(spot.value, tuple):
            draft.set(spot.path, tuple(map(change, spot.value)))
    built: T = draft.build()
    return built
