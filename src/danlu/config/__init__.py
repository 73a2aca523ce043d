"""A run's configuration as a tree of frozen dataclasses, to and from JSON (standard library only).

Every component has a frozen dataclass beside it whose fields are its arguments; a run's configuration is their tree.
This package turns such a tree into plain JSON and back, compares two of them, edits one by dotted paths and finds what
its fields mean. It rejects what it does not understand: an unknown key is answered with the nearest known one, a value
of the wrong type with the type that is accepted.

How a field is declared decides how its value is written:

- one dataclass: a plain object;
- a union of dataclasses: an object with the class name under ``"type"``;
- a protocol of :mod:`danlu.protocols` (or ``Any``), alone or in the union: open to any dataclass, whose
  ``"type"`` is ``"module:Class"``. With ``Annotated[Protocol, Known("danlu.optim")]`` the dataclasses that this package
  defines are written by their class name alone.

Reading imports a module only if it belongs to danlu or has been imported already: a configuration file never makes
foreign code run. A key that is absent takes today's default. A field that was renamed is read under its old name for
one release: the class says ``renamed: ClassVar[dict[str, str]] = {"old": "new"}``.
"""

from danlu.config.compare import changes, differences, fingerprint, flatten
from danlu.config.describe import describe
from danlu.config.draft import Draft
from danlu.config.hints import IsPath, Known, Place, hints_of, place, short_name
from danlu.config.migrations import FORMAT
from danlu.config.paths import absolute_paths, moved_paths, path_options
from danlu.config.pretrained import Pretrained
from danlu.config.tree import dumps, from_document, from_tree, loads, to_document, to_tree

__all__ = [
    "FORMAT",
    "Draft",
    "IsPath",
    "Known",
    "Place",
    "Pretrained",
    "absolute_paths",
    "changes",
    "describe",
    "differences",
    "dumps",
    "fingerprint",
    "flatten",
    "from_document",
    "from_tree",
    "hints_of",
    "loads",
    "moved_paths",
    "path_options",
    "place",
    "short_name",
    "to_document",
    "to_tree",
]
