"""Parquet tables: a document per row, read a few rows at a time out of one row group after another."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from danlu.data.document import Document
from danlu.data.tables import arrow, column, texts


def read(path: Path, file: BinaryIO, *, field: str, errors: str, skipped: Counter[str]) -> Iterator[Document]:
    """Yield the column ``field``, see :class:`danlu.data.readers.Read`."""
    pa, parquet = arrow(path), arrow(path, "parquet")
    try:
        table = parquet.ParquetFile(file)
        column(path, table.schema_arrow, field)
        yield from texts(path, table.iter_batches(columns=[field], batch_size=256), field, skipped)
    except (pa.ArrowException, OSError) as problem:
        raise ValueError(f"{path} cannot be read as a parquet file: {problem}") from None
