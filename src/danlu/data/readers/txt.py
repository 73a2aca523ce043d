"""Plain text: a file is one document."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from danlu.data.document import Document, decode, examine


def read(path: Path, file: BinaryIO, *, field: str, errors: str, skipped: Counter[str]) -> Iterator[Document]:
    """Yield the file's content as it stands, see :class:`danlu.data.readers.Read`."""
    data = file.read()
    examine(data)
    yield Document(str(path), decode(data, str(path), errors))
