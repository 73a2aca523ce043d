"""Configuration leaves set by their path: ``--model.dim 512``."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from danlu._validate import nearest

__all__ = ["apply", "leaves"]

T = TypeVar("T")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every leaf of a tree of dataclasses that can be set.

    A section that is None in this tree is no leaf: there is no one value that would stand for it.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Model:
    ...     dim: int = 8
    >>> @dataclass(frozen=True)
    ... class Run:
    ...     model: Model = Model()
    ...     steps: int = 3
    >>> list(leaves(Run()))
    [('model.dim', 8), ('steps', 3)]
    """
    for path, value, hint in _nodes(config, prefix):
        if is_dataclass(value):
            yield from leaves(value, f"{path}.")
        elif not (_is_empty(value) and _may_hold_a_section(hint)):
            yield path, value


def apply(config: T, words: Sequence[str], *, fixed: Sequence[str] = ()) -> T:
    """Return ``config`` with the leaves named in ``words`` replaced.

    Args:
        config: a tree of frozen dataclasses, the defaults.
        words: alternately ``--path.to.leaf`` and its value or values, or ``--path.to.leaf=value``.
        fixed: leaves that cannot be set.

    Returns:
        A new tree of the same types; the class of a nested config is the one it has in ``config``.

    Raises:
        ValueError: an unknown path (the nearest one is named), a value of another type, or one its class refuses.
    """
    # An attribute's spelling is the path's: hyphens are taken for underscores, as command lines often have them.
    settable = {path: value for path, value in leaves(config) if path not in fixed}
    absent = list(_absent(config))
    for word in words:
        if word.startswith("--"):
            _check_path(word[2:].split("=", 1)[0].replace("-", "_"), settable, absent)
    # Imported here because it costs a tenth of a second that a plain `danlu train` need not pay.
    import tyro

    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    captured = io.StringIO()
    try:
        with _unwrapped(), contextlib.redirect_stderr(captured):
            return tyro.cli(
                type(config),
                prog="danlu train",
                args=list(words),
                default=config,
                use_underscores=True,
                add_help=False,
                config=markers,
            )
    except SystemExit:
        raise ValueError(_line(captured.getvalue())) from None


def _nodes(config: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(type(config))
    for field in fields(config):
        path, value = f"{prefix}{field.name}", getattr(config, field.name)
        if isinstance(value, tuple) and any(is_dataclass(item) for item in value):
            # A section that there are several of: each is reached by its number, and an empty place is no section.
            yield from ((f"{path}.{i}", item, Any) for i, item in enumerate(value) if is_dataclass(item))
        else:
            yield path, value, hints[field.name]


def _may_hold_a_section(hint: Any) -> bool:
    return hint is Any or is_dataclass(hint) or any(_may_hold_a_section(member) for member in get_args(hint))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and all(item is None for item in value))


def _absent(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the paths of the sections that are None."""
    for path, value, hint in _nodes(config, prefix):
        if is_dataclass(value):
            yield from _absent(value, f"{path}.")
        elif _is_empty(value) and _may_hold_a_section(hint):
            yield path


def _check_path(path: str, settable: dict[str, Any], absent: Sequence[str]) -> None:
    if path in settable:
        return
    for section in absent:
        if path == section or path.startswith(f"{section}."):
            raise ValueError(f"--{path}: this recipe has no {section}, so it cannot be set")
    if any(leaf.startswith(f"{path}.") for leaf in settable):
        inside = ", ".join(f"--{leaf}" for leaf in settable if leaf.startswith(f"{path}."))
        raise ValueError(f"--{path} is a section; set one of its leaves: {inside}")
    # People remember a leaf's name better than its section.
    same_name = [leaf for leaf in settable if leaf.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
    close = same_name[0] if same_name else nearest(path, settable)
    hint = f"; did you mean --{close}?" if close else "; `danlu show RECIPE` lists them all"
    raise ValueError(f"the configuration has no leaf --{path}{hint}")


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Keep tyro from folding its messages at the terminal's width, which would tear words apart."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _line(text: str) -> str:
    """Return what one of tyro's messages says, as one line; it is a box in Unicode, or ruled lines in ASCII.

    >>> _line("╭─ Value error ─╮\\n│ Error parsing --a: no │\\n│ ─── │\\n│ Argument helptext: │\\n│ --a INT │\\n╰──╯")
    'Error parsing --a: no (accepted: --a INT)'
    >>> _line(" Unrecognized options \\n -------- \\n  Unrecognized options: b \\n")
    "'b' belongs to no option"
    """
    parts: list[list[str]] = [[]]
    for row in (row.strip("│ ") for row in text.splitlines()):
        if row and set(row) <= set("─-"):
            parts.append([])
        elif row and row[0] not in "╭╰":
            parts[-1].append(row)
    # Without a box the title is a part of its own.
    body = parts if "╭" in text else parts[1:]
    message = " ".join(body[0]) if body else " ".join(text.split())
    stray = message.removeprefix("Unrecognized options: ")
    if stray != message:
        return f"{stray!r} belongs to no option"
    accepted = next((part[1:] for part in body if part[:1] == ["Argument helptext:"]), None)
    return f"{message} (accepted: {' '.join(accepted)})" if accepted else message
