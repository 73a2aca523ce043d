"""A text with its name, and how bytes become text."""

from typing import NamedTuple

__all__ = ["Document", "decode"]


class Document(NamedTuple):
    """One text and the name it is reported by (a path, or ``path:line`` in a file of many texts)."""

    name: str
    text: str


def decode(data: bytes, where: str, errors: str) -> str:
    """Decode UTF-8 as it stands (line ends are kept), less a byte order mark.

    Args:
        data: the bytes.
        where: what the error calls them.
        errors: ``"strict"`` or ``"replace"``, which puts U+FFFD in the place of bytes that are not UTF-8.

    Raises:
        ValueError: the bytes are not UTF-8, and ``errors`` is ``"strict"``.
    """
    try:
        return data.decode("utf-8", errors).removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        raise ValueError(
            f"{where} is not UTF-8 at byte {problem.start} (0x{data[problem.start]:02x}); "
            "convert it, or set errors to 'replace'"
        ) from None
