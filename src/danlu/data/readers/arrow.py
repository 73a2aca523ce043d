"""Arrow tables, which Hugging Face data sets are on disk (``save_to_disk``): a document per row.

A memory of one batch of rows is needed; both forms are read, the stream and the file.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from danlu.data.document import Document
from danlu.data.tables import arrow, column, texts


def read(path: Path, file: BinaryIO, *, field: str, errors: str, skipped: Counter[str]) -> Iterator[Document]:
    """Yield the column ``field``, see :class:`danlu.data.readers.Read`."""
    pa, ipc = arrow(path), arrow(path, "ipc")
    try:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            whole = ipc.open_file(file)
            schema, batches = whole.schema, (whole.get_batch(n) for n in range(whole.num_record_batches))
        else:
            stream = ipc.open_stream(file)
            schema, batches = stream.schema, iter(stream)
        column(path, schema, field)
        yield from texts(path, batches, field, skipped)
    except (pa.ArrowException, OSError) as problem:
        raise ValueError(f"{path} cannot be read as an Arrow file: {problem}") from None
