"""Folders of tokens that `danlu tokenize` wrote: opened at once, whatever their size, and checked on request.

A folder holds ``index.json``, ``tokenizer.json``, ``sources.json``, and shards: ``train-00000.bin`` (tokens,
little-endian unsigned integers) with ``train-00000.crc`` (the CRC-32 of each 4 KiB of it), ``validation-00000.bin``
and so on. ``index.json`` is written last: without it the folder is not complete. Its hash is the identity of the data.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from danlu.data.joined import Joined, Shard, checksums
from danlu.data.shards import token_dtype
from danlu.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["FORMAT", "INDEX", "PLAN", "SIDES", "TokenFolder", "check", "is_tokenized", "open_folder"]

FORMAT = 1
INDEX, PLAN = "index.json", "plan.json"
SIDES = ("train", "validation")
_READ = 2**22


@dataclass(frozen=True)
class TokenFolder:
    """A folder of tokens.

    Attributes:
        path: the folder.
        index: what its index says.
        sha256: the hash of the index, which holds the hashes of everything else.
        tokenizer: its vocabulary.
        train, validation: the two streams.
    """

    path: Path
    index: dict[str, Any]
    sha256: str
    tokenizer: Tokenizer
    train: Joined
    validation: Joined


def is_tokenized(path: Path) -> bool:
    """Whether ``path`` is a folder that `danlu tokenize` wrote, or is writing."""
    return path.is_dir() and ((path / PLAN).is_file() or ((path / INDEX).is_file() and _is_index(path / INDEX)))


def open_folder(path: Path) -> TokenFolder:
    """Open a folder of tokens: its shards are checked where they are read, here only their sizes.

    Raises:
        ValueError: it is not complete, is of another release, or a file is missing or of another size.
        OSError: a file cannot be read.
    """
    index, digest = _index(path)
    tokenizer = load_tokenizer(path / "tokenizer.json")
    if tokenizer.sha256 != index["tokenizer"]:
        raise ValueError(f"{path / 'tokenizer.json'} is not the vocabulary that {path} was made with")
    dtype = np.dtype(index["dtype"])
    streams = []
    for side in SIDES:
        shards = []
        for entry in index[side]:
            file, tokens = os.path.join(path, entry["file"]), entry["tokens"]
            _check_size(file, tokens * dtype.itemsize)
            shards.append(Shard(file, tokens, dtype))
        streams.append(Joined(shards))
    return TokenFolder(path, index, digest, tokenizer, *streams)


def check(path: Path, advance: Callable[[int], None] = lambda count: None) -> list[str]:
    """Read all of a folder of tokens and say what is wrong with it, a sentence a file; an empty list: nothing.

    Args:
        path: the folder.
        advance: is told of bytes that were read.

    Raises:
        ValueError, OSError: the index or the tokenizer is not what it was, so that nothing can be said.
    """
    index, _ = _index(path)
    found = []
    if load_tokenizer(path / "tokenizer.json").sha256 != index["tokenizer"]:
        found.append("tokenizer.json is another vocabulary")
    size = np.dtype(index["dtype"]).itemsize
    for entry in (entry for side in SIDES for entry in index[side]):
        file = path / entry["file"]
        try:
            _check_size(str(file), entry["tokens"] * size)
            sums = np.fromfile(file.with_suffix(".crc"), dtype="<u4")
            if wrong := _differences(file, entry["sha256"], sums, advance):
                found.append(f"{file.name} {wrong}")
        except (OSError, ValueError) as problem:
            found.append(str(problem))
    return found


def _differences(file: Path, sha256: str, sums: np.ndarray[Any, Any], advance: Callable[[int], None]) -> str:
    digest, seen = hashlib.sha256(), []
    with file.open("rb") as stream:
        while data := stream.read(_READ):
            digest.update(data)
            seen.append(checksums(data))
            advance(len(data))
    if digest.hexdigest() != sha256:
        now = np.concatenate(seen)
        wrong = np.flatnonzero(now != sums) if len(now) == len(sums) else np.array([], dtype=np.int64)
        where = f" in {len(wrong)} of {len(sums)} blocks, the first at byte {wrong[0] * 4096}" if len(wrong) else ""
        return f"is not what was written{where}"
    if not np.array_equal(np.concatenate(seen), sums):
        return "is whole, but its .crc file is not"
    return ""


def _check_size(file: str, size: int) -> None:
    try:
        there = os.stat(file).st_size
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    if there != size:
        raise ValueError(f"{file} has {there} bytes and had {size} when it was written")


def _is_index(path: Path) -> bool:
    with path.open("rb") as file:
        return b'"danlu tokens"' in file.read(100)


def _index(path: Path) -> tuple[dict[str, Any], str]:
    file = path / INDEX
    if not is_tokenized(path):
        raise ValueError(f"{path} is no folder of tokens, which danlu tokenize --out writes")
    if not file.is_file():
        raise ValueError(f"{path} is not complete: give danlu tokenize --out {path} again with what it began with")
    content = file.read_bytes()
    try:
        index = json.loads(content)
        if index["format"] != "danlu tokens":
            raise ValueError
        if index["version"] > FORMAT:
            raise ValueError(f"{path} was written by a later release of danlu (format {index['version']})")
        if np.dtype(index["dtype"]) != token_dtype(index["vocab_size"]):
            raise ValueError
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(str(problem) if "release" in str(problem) else f"{file} is damaged") from None
    return index, hashlib.sha256(content).hexdigest()
