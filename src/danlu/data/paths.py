"""The files behind the paths that somebody names: files, folders and globs."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["expand", "walk"]


def expand(paths: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """Yield the files and folders that ``paths`` name, each with whether it was named outright, not by a glob.

    Args:
        paths: files, folders and globs (``*``, ``?``, ``[]``, ``**``); ``~`` is the home folder. What a glob matches
            comes in sorted order.

    Raises:
        TypeError: ``paths`` is one string.
        ValueError: ``paths`` is empty.
        FileNotFoundError: a path does not exist, or a glob matches nothing.
    """
    if isinstance(paths, str):
        raise TypeError(f"path must be a sequence of paths, got the string {paths!r}; give ({paths!r},)")
    if not paths:
        raise ValueError("path must name at least one file, folder or glob, got an empty list")
    for given in paths:
        path = Path(given).expanduser()
        if path.exists():
            yield path, True
        elif glob.has_magic(given):
            matches = sorted(glob.glob(str(path), recursive=True))
            if not matches:
                raise FileNotFoundError(f"the pattern {given} matches no file")
            yield from ((Path(match), False) for match in matches)
        else:
            raise FileNotFoundError(f"no file or folder is called {given}")


def walk(folder: Path, *, skip: frozenset[str] = frozenset(), hidden: list[str] | None = None) -> Iterator[Path]:
    """Yield the regular files of a folder at every depth, in a fixed order.

    Args:
        folder: where to begin.
        skip: names of folders that are not entered.
        hidden: a list that receives the names beginning with a dot, which are then left out; None keeps them.

    Raises:
        OSError: a folder cannot be read.
    """

    def stop(problem: OSError) -> None:
        raise problem

    for parent, folders, files in os.walk(folder, onerror=stop):
        folders[:] = sorted(set(folders) - skip)
        names = sorted(files)
        if hidden is not None:
            hidden += [name for name in folders + names if name.startswith(".")]
            folders[:] = [name for name in folders if not name.startswith(".")]
            names = [name for name in names if not name.startswith(".")]
        yield from (path for name in names if (path := Path(parent, name)).is_file())
