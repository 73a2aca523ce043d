"""Plain text: a file is one document."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from danlu.data.document import Document, decode


def read(path: Path, data: bytes, *, field: str, errors: str, skipped: Counter[str]) -> Iterator[Document]:
    """Yield the file's content as it stands, see :class:`danlu.data.readers.Read`."""
    yield Document(str(path), decode(data, str(path), errors))
