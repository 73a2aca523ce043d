"""What the fields of a configuration mean, out of the documentation that stands in its class."""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
from typing import Any, cast

__all__ = ["describe"]

_SECTION = re.compile(r"(Attributes|Args|Arguments):\s*$")
_ENTRY = re.compile(r"(\w+(?:, \w+)*)(?: \([^)]*\))?:\s+(.*)$")


@functools.cache
def describe(cls: type) -> dict[str, str]:
    """Return what each field of a dataclass means, as one line, for the fields that are documented.

    Read from the ``Attributes:`` or ``Args:`` section of the docstring, or from the strings under the fields.

    >>> @dataclasses.dataclass
    ... class Sizes:
    ...     '''Sizes.
    ...
    ...     Attributes:
    ...         dim: size of a token's features,
    ...             a multiple of 8.
    ...     '''
    ...     dim: int = 8
    >>> describe(Sizes)
    {'dim': "size of a token's features, a multiple of 8"}
    """
    names = {field.name for field in dataclasses.fields(cast(Any, cls))}
    found: dict[str, str] = {}
    for kind in reversed(cls.__mro__[:-1]):
        found |= _section(vars(kind).get("__doc__") or "")
        if names - found.keys():
            found |= _under_fields(kind)
    return {name: text.removesuffix(".") for name, text in found.items() if name in names}


def _section(docstring: str) -> dict[str, str]:
    """The entries of a docstring's section, by name."""
    found: dict[str, str] = {}
    current: tuple[str, ...] = ()
    inside, depth = False, 0
    for line in inspect.cleandoc(docstring).splitlines():
        indent = len(line) - len(line.lstrip())
        if _SECTION.match(line):
            inside, depth, current = True, 0, ()
        elif inside and line.strip() and indent == 0:
            inside = False
        elif inside and line.strip():
            depth = depth or indent
            entry = _ENTRY.match(line.strip()) if indent == depth else None
            if entry:
                current = tuple(entry[1].split(", "))
                found |= dict.fromkeys(current, entry[2])
            else:
                found |= {name: f"{found[name]} {line.strip()}" for name in current}
    return found


def _under_fields(cls: type) -> dict[str, str]:
    """The strings that stand under fields, by the field's name; none where the source is not at hand."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
