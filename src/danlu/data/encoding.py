"""Texts to tokens, in pieces: what several threads or processes share, and what shows how far they are."""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from danlu.data.tokenizer import Tokenizer

__all__ = ["LEARNED_BYTES", "encode", "encode_pieces", "marked_pieces", "pieces", "without_long_words"]

LEARNED_BYTES = 64 * 2**20
"""A tokenizer learns from this much text at most."""

# The trainer's time grows with the square of a word's length, and a word without end (base64, DNA) is a whole piece.
_LONG_WORD = re.compile(r"\S{256}")
_PIECE = 2**16
# Pieces encoded together: as many threads share them, and progress is seen between two batches.
_TOGETHER = 64


def without_long_words(text: str) -> str:
    """Break words that are too long to learn from.

    >>> len(max(without_long_words("a" * 1000).split(), key=len))
    256
    """
    return _LONG_WORD.sub(r"\g<0>\n", text)


def pieces(text: str) -> Iterator[str]:
    """Cut a text after line ends (or anywhere, in lines too long) into pieces that threads can share."""
    start = 0
    while len(text) - start > _PIECE:
        line = text.rfind("\n", start, start + _PIECE) + 1
        stop = line if line > start else start + _PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def encode(texts: Iterator[str], tokenizer: Tokenizer, advance: Callable[[int], None]) -> Iterator[NDArray[np.int64]]:
    """Encode texts, each followed by the end token, many pieces at a time."""
    marked = (piece for text in texts for piece in marked_pieces(text))
    while batch := list(islice(marked, _TOGETHER)):
        yield from encode_pieces(batch, tokenizer, advance)


def encode_pieces(
    marked: Sequence[tuple[str, bool]], tokenizer: Tokenizer, advance: Callable[[int], None]
) -> Iterator[NDArray[np.int64]]:
    """Encode pieces together; the end token follows those that are the last of their text.

    Args:
        marked: pieces of :func:`marked_pieces`.
        tokenizer: encodes them.
        advance: is told of the bytes of each.
    """
    end = np.array([tokenizer.end])
    for ids, (piece, last) in zip(tokenizer.encode_batch([piece for piece, _ in marked]), marked, strict=True):
        advance(len(piece.encode()))
        yield np.asarray(ids, dtype=np.int64)
        if last:
            yield end


def marked_pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each piece of a text with whether it is the last one."""
    following = pieces(text)
    piece = next(following)
    for later in following:
        yield piece, False
        piece = later
    yield piece, True
