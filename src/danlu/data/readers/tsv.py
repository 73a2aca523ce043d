"""Tables of tab-separated values: the first line names the columns, every further line is a document.

As registered with IANA (text/tab-separated-values): no quoting, so a value holds neither tabs nor line ends.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from danlu.data.document import Document, decode, lines


def read(path: Path, file: BinaryIO, *, field: str, errors: str, skipped: Counter[str]) -> Iterator[Document]:
    """Yield the column ``field``, see :class:`danlu.data.readers.Read`."""
    rows = (line.removesuffix(b"\r") for line in lines(file))
    columns = decode(next(rows), f"{path}:1", errors).split("\t")
    if field not in columns:
        raise ValueError(f"{path} has the columns {', '.join(columns)} and not {field!r}; set field")
    for number, row in enumerate(rows, 2):
        where = f"{path}:{number}"
        if not row.strip():
            continue
        values = decode(row, where, errors).split("\t")
        if len(values) != len(columns):
            raise ValueError(f"{where} must have {len(columns)} values, one for each column, got {len(values)}")
        text = values[columns.index(field)]
        if text:
            yield Document(where, text)
        else:
            skipped["empty"] += 1
