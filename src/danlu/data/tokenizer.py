"""Byte-level BPE by the Hugging Face tokenizers library: every text has an encoding, and it decodes to the same bytes.

``<|end|>`` separates documents. It is never produced from text, not even from text that spells it.
"""

import codecs
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from danlu._validate import integer

END = "<|end|>"
_LARGEST_FILE = 64 * 2**20


class Tokenizer:
    """A byte-level BPE vocabulary: text to token ids and back.

    Args:
        backend: a ``tokenizers.Tokenizer`` with a BPE model and byte-level pre-tokenization, without normalizer,
            truncation or padding, whose vocabulary covers all 256 bytes and holds the special token ``<|end|>`` (or
            GPT-2's ``<|endoftext|>``).

    Attributes:
        end: id of the token that separates documents; a text begins after it and ends with it.
        vocab_size: number of tokens, special ones included.
        sha256: hash of the vocabulary file.

    Raises:
        ValueError: the backend is of another kind.

    >>> tokenizer = train_tokenizer(["to be or not to be"], vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode("être <|end|>"))
    'être <|end|>'
    """

    def __init__(self, backend: Backend) -> None:
        described = backend.to_str()
        self.end, self._bytes = _examine(json.loads(described))
        self.vocab_size = len(self._bytes)
        self.sha256 = hashlib.sha256(described.encode()).hexdigest()
        # Text that spells a special token is text.
        backend.encode_special_tokens = True
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; no special token is added."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all threads."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``: special tokens are left out, bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text while ids arrive, each character as soon as its last byte is there and none in halves.

        >>> tokenizer = train_tokenizer(["abc"], vocab_size=257)
        >>> list(tokenizer.decode_stream(tokenizer.encode("né")))
        ['n', 'é']
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            if text := decoder.decode(self.bytes_of(token)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that one token stands for; a special token stands for none."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token ids must be from 0 to {self.vocab_size - 1}, got {token}")
        return self._bytes[token]

    @functools.cached_property
    def byte_lengths(self) -> Tensor:
        """Bytes of each token, int64 of shape ``(vocab_size,)``, special tokens 0.

        The bits per byte of a text are then ``nll.sum() / (log(2) * byte_lengths[targets].sum())``, exactly.
        """
        return torch.tensor([len(b) for b in self._bytes], dtype=torch.int64)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary as a ``tokenizer.json`` that the tokenizers library reads."""
        # Not the library's own save, whose errors are not OSErrors.
        Path(path).write_bytes(self._backend.to_str(pretty=True).encode())


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE vocabulary (Sennrich et al. 2016, on bytes as in GPT-2) on texts.

    Args:
        texts: any number of texts, read once.
        vocab_size: tokens wanted, at least 257 (256 bytes and ``<|end|>``). Text that repeats too little for so many
            merges gives fewer: see :attr:`Tokenizer.vocab_size`.
    """
    integer("vocab_size", vocab_size, low=257)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a ``tokenizer.json`` and check that it is of a kind that :class:`Tokenizer` accepts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, is not JSON, or describes another kind of tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"{path} is larger than {_LARGEST_FILE >> 20} MiB, too large for a tokenizer")
    try:
        text = path.read_bytes().decode()
        # Checked before the library sees it: a malformed vocabulary must not reach native code.
        _examine(json.loads(text))
        return Tokenizer(Backend.from_str(text))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for a tokenizer file") from None
    except Exception as problem:
        raise ValueError(f"{path} cannot be used as a tokenizer: {problem}") from None


@functools.cache
def _alphabet() -> dict[str, int]:
    """Map the character by which byte-level BPE writes a byte to that byte (GPT-2's encoding).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _examine(spec: Any) -> tuple[int, tuple[bytes, ...]]:
    """Check the description of a tokenizer; return the id of its end token and the bytes of every token."""

    def part(name: str) -> dict[str, Any]:
        value = spec.get(name)
        return value if isinstance(value, dict) else {}

    if not isinstance(spec, dict) or part("model").get("type") != "BPE":
        raise ValueError("its model must be BPE")
    before = part("pre_tokenizer")
    if before.get("type") != "ByteLevel" or before.get("add_prefix_space") is not False:
        raise ValueError("its pre-tokenizer must be ByteLevel without a prefix space, else texts change when encoded")
    for name in ("normalizer", "truncation", "padding"):
        if spec.get(name) is not None:
            raise ValueError(f"it must have no {name}, else texts change when encoded")
    if part("model").get("dropout") or part("model").get("ignore_merges"):
        raise ValueError("its model must have neither dropout nor ignore_merges")
    if any(part("model").get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError("its model must have neither a subword prefix nor a word suffix")
    vocab, added = part("model").get("vocab"), spec.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise ValueError("it must have a vocabulary")
    special: dict[str, int] = {}
    for token in added:
        if not isinstance(token, dict) or token.get("special") is not True:
            raise ValueError("its added tokens must all be special")
        special[str(token.get("content"))] = token["id"] if isinstance(token.get("id"), int) else -1
    ids = vocab | special
    if sorted(ids.values(), key=lambda v: v if type(v) is int else -1) != list(range(len(ids))):
        raise ValueError("its token ids must be 0, 1, 2 … without gaps")
    alphabet = _alphabet()
    table = [b""] * len(ids)
    for token, number in vocab.items():
        if token not in special:
            if not all(c in alphabet for c in token):
                raise ValueError(f"its token {token!r} is not written in the byte-level alphabet")
            table[number] = bytes(alphabet[c] for c in token)
    if not all(c in vocab for c in alphabet):
        raise ValueError("its vocabulary must hold all 256 bytes")
    end = next((special[name] for name in (END, "<|endoftext|>") if name in special), None)
    if end is None:
        raise ValueError(f"it must have the special token {END} or <|endoftext|>")
    return end, tuple(table)
