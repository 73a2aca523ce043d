"""What parquet and Arrow files have in common: the package that reads them, and a column of text."""

import importlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from danlu.data.document import Document

__all__ = ["arrow", "column", "texts"]


def arrow(path: Path, module: str = "") -> Any:
    """Return pyarrow, or one of its modules.

    Raises:
        ImportError: it is not installed; the extra that has it is named.
    """
    try:
        return importlib.import_module(f"pyarrow.{module}" if module else "pyarrow")
    except ImportError:
        raise ImportError(f"{path} is read by the package pyarrow: pip install 'danlu[files]'") from None


def column(path: Path, schema: Any, field: str) -> None:
    """Raise ValueError unless the table has a column ``field`` of strings."""
    pa = arrow(path)
    if field not in schema.names:
        raise ValueError(f"{path} has the columns {', '.join(schema.names)} and not {field!r}; set field")
    kind = schema.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"{path}: the column {field!r} must hold strings, got {kind}")


def texts(path: Path, batches: Iterable[Any], field: str, skipped: Counter[str]) -> Iterator[Document]:
    """Yield the strings of a column as documents, rows counted from 1; empty ones and nulls are left out."""
    number = 0
    for batch in batches:
        for value in batch.column(batch.schema.get_field_index(field)).to_pylist():
            number += 1
            if value:
                yield Document(f"{path}: row {number}", value)
            else:
                skipped["empty"] += 1
