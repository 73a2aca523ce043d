"""JSON lines under their other suffix."""

from danlu.data.readers.jsonl import read

__all__ = ["read"]
