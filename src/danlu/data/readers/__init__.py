"""How a file becomes documents: one module per suffix, called as the suffix is.

``readers/tsv.py`` reads files that end in ``.tsv``: a new kind of file is a new module with a function ``read``, and
the folder is the list of kinds. A file of any other suffix is one document, as in ``readers/txt.py``. Each kind may be
compressed (``.jsonl.gz``, ``.tsv.zst``), see :mod:`danlu.data.files`.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from danlu.data.document import Document

__all__ = ["BY_LINE", "Read", "reader"]

_FOLDER = Path(__file__).parent

BY_LINE = frozenset((".jsonl", ".ndjson"))
"""Suffixes of files that can be read from any line on, so that several processes may share one."""


class Read(Protocol):
    """The function ``read`` of a reader."""

    def __call__(
        self, path: Path, file: BinaryIO, *, field: str, errors: str, skipped: Counter[str]
    ) -> Iterator[Document]:
        """Yield the documents of a file, reading on only as they are asked for.

        Args:
            path: the file, for messages.
            file: its content, from the beginning; without compression it can be sought in.
            field: key or column of the text, where a record has several.
            errors: ``"strict"`` or ``"replace"``, for bytes that are not UTF-8.
            skipped: counts what is left out, by reason.

        Raises:
            NotText: before the first document: the file holds no text. :func:`danlu.data.document.examine` raises it
                for zero bytes, UTF-16 and nothing but white space.
            ValueError: the content is not what the suffix says.
        """


def reader(path: Path) -> Read:
    """Return how a file is read, by its suffix.

    >>> reader(Path("a.tsv")).__module__, reader(Path("README")).__module__
    ('danlu.data.readers.tsv', 'danlu.data.readers.txt')
    """
    suffix = path.suffix.lower().removeprefix(".")
    known = suffix.isalnum() and (_FOLDER / f"{suffix}.py").is_file()
    found: Read = importlib.import_module(f"{__name__}.{suffix if known else 'txt'}").read
    return found
