"""JSON lines: one object per line, with the text under a key."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from danlu.data.document import Document, decode, lines


def read(path: Path, file: BinaryIO, *, field: str, errors: str, skipped: Counter[str]) -> Iterator[Document]:
    """Yield the strings under ``field``, see :class:`danlu.data.readers.Read`."""
    for number, raw in enumerate(lines(file), 1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        line = decode(raw, where, errors)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise ValueError(f"{where} is not JSON ({problem})") from None
        if not isinstance(record, dict) or field not in record:
            has = f"the keys {', '.join(sorted(record)[:8])}" if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{where} must be a JSON object with the key {field!r}, got {has}; set field")
        text = record[field]
        if not isinstance(text, str):
            raise ValueError(f"{where}: {field!r} must be a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            if errors == "strict":
                raise ValueError(f"{where}: {field!r} has half a surrogate pair at character {problem.start}") from None
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text:
            yield Document(where, text)
        else:
            skipped["empty"] += 1
