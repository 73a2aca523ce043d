"""Text to a folder of tokens, by any number of processes, as often interrupted as it happens.

The folder is claimed and the plan written first; then come the units' records and shards, each whole when it has its
name; the index is written last and the plan removed. So a folder is complete, or goes on where it was.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from danlu._validate import choice, integer, number
from danlu.data.corpus import find_files, source_of, split, splits_by_documents
from danlu.data.encoding import LEARNED_BYTES, pieces, without_long_words
from danlu.data.files import Part
from danlu.data.preparing import Progress, prepare
from danlu.data.shards import token_dtype, write_whole
from danlu.data.tokenized import FORMAT, INDEX, PLAN, SIDES
from danlu.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from danlu.data.units import RECORDS, Job, cut, documents, encode_unit, record, survey_unit, unit_bytes
from danlu.data.workers import Advance, perform_all

__all__ = ["tokenize"]

_LOCK = ".lock"
# A tokenizer learns from the beginnings of so many units at most.
_LEARNED_UNITS = 64


class _Task(NamedTuple):
    """A unit and what is to be done with it: to be encoded, or without a tokenizer to be surveyed."""

    job: Job
    number: int
    unit: list[Part]
    tokenizer: str | None = None
    whole: bool = True


def tokenize(
    paths: Sequence[str],
    out: str | os.PathLike[str],
    *,
    workers: int = 0,
    tokenizer: str | os.PathLike[str] | None = None,
    vocab_size: int = 4096,
    validation: float = 0.05,
    field: str = "text",
    errors: str = "strict",
) -> dict[str, Any]:
    """Write the tokens of files into a folder that ``TextConfig(path=(folder,))`` opens at once.

    Killed or interrupted, it goes on where it was when it is called again; what is complete is left as it is.

    Args:
        paths: files, folders and globs, as in :func:`danlu.data.corpus.open_corpus`.
        out: the folder: one that is not there yet, is empty, or that the same call began.
        workers: processes; 0 does the work in this one. The result does not depend on it.
        tokenizer: a tokenizer.json; None to train one, of ``vocab_size`` tokens, on the training text.
        vocab_size: tokens of the vocabulary that is trained.
        validation: share of the text that is kept from training, as in :class:`danlu.data.text.TextConfig`.
        field, errors: as there.

    Returns:
        The index: tokens, documents and bytes of each side, and the shards with their hashes.

    Raises:
        FileExistsError: ``out`` holds something else, or another process writes in it.
        FileNotFoundError, ValueError, ImportError: the input cannot be read, or changed since it was begun.
        OSError: ``out`` cannot be written.
    """
    integer("workers", workers, low=0)
    integer("vocab_size", vocab_size, low=257)
    number("validation", validation, low=0, high=0.5, low_open=True)
    choice("errors", errors, ("strict", "replace"))
    out = Path(out)
    files, hidden = find_files(paths)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    stats = [path.stat() for path, _ in files]
    plan: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": vocab_size if given is None else given.sha256,
        "validation": validation,
        "field": field,
        "errors": errors,
        "unit": _unit(out, sum(s.st_size for s in stats)),
        "files": [[os.path.realpath(p), s.st_size, s.st_mtime_ns] for (p, _), s in zip(files, stats, strict=True)],
    }
    job = Job(out, field, errors, validation)
    units = cut(files, [s.st_size for s in stats], plan["unit"])
    with _claimed(out):
        if not _begun(out, plan):
            prepare(lambda progress: _build(job, units, plan, hidden, source_of(paths), given, workers, progress))
        index: dict[str, Any] = json.loads((out / INDEX).read_bytes())
    return index


def _unit(out: Path, total: int) -> int:
    """Bytes of a unit: those that the folder was begun with, whatever this release would take."""
    for name in (PLAN, "sources.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((out / name).read_bytes())["unit"])
    return unit_bytes(total)


class _claimed:  # noqa: N801
    """The folder, made if it is not there, for this process alone; a lock that a crash releases."""

    def __init__(self, out: Path) -> None:
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"{out} is a file; choose a folder for --out")
        self._out, self._made = out, not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(out / _LOCK, timeout=0)

    def __enter__(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise FileExistsError(f"another process is writing in {self._out}; wait for it, or stop it") from None

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _begun(out: Path, plan: dict[str, Any]) -> bool:
    """Whether the folder is complete; begin it unless it was begun.

    Raises:
        FileExistsError: it holds something else.
    """
    described = json.dumps(plan).encode()
    there = [path for path in out.iterdir() if path.name != _LOCK]
    if (out / INDEX).is_file():
        made_by = json.loads((out / "sources.json").read_bytes())["plan"] if (out / "sources.json").is_file() else None
        if made_by != hashlib.sha256(described).hexdigest():
            raise FileExistsError(f"{out} is complete and was made of other input; choose another folder")
        _clear(out)
        return True
    if (out / PLAN).is_file():
        then = json.loads((out / PLAN).read_bytes())
        if then != plan:
            names = [name for name in plan if then.get(name) != plan[name]]
            raise FileExistsError(
                f"{out} was begun with other {', '.join(names)}; give what it was begun with, or choose another folder"
            )
        return False
    if [path for path in there if not path.name.startswith(f".{PLAN}")]:
        raise FileExistsError(f"{out} exists and is left as it is; choose another folder")
    write_whole(out / PLAN, described)
    return False


def _build(
    job: Job,
    units: list[list[Part]],
    plan: dict[str, Any],
    hidden: int,
    source: str,
    given: Tokenizer | None,
    workers: int,
    progress: Progress,
) -> None:
    out = job.out
    (out / RECORDS).mkdir(exist_ok=True)
    progress.begin(f"reading {sum(size for _, size, _ in plan['files']) / 1e6:.1f} MB", 0)
    left = [_Task(job, n, unit) for n, unit in enumerate(units) if not record(job, "survey", n).is_file()]
    perform_all(left, _perform, workers=min(workers, len(left)), advance=progress.advance)
    surveys = [json.loads(record(job, "survey", n).read_bytes()) for n in range(len(units))]
    total = Counter({name: sum(s[name] for s in surveys) for name in ("documents", "bytes", "held_out")})
    skipped = sum((Counter(s["skipped"]) for s in surveys), Counter({"hidden": hidden} if hidden else {}))
    longest = max(s["longest"] for s in surveys)
    whole = splits_by_documents(
        source, job.validation, total["documents"], total["bytes"], total["held_out"], longest, skipped
    )
    file = out / "tokenizer.json"
    if not file.is_file():
        if given is None:
            vocab_size = plan["tokenizer"]
            progress.begin(
                f"training a tokenizer of {vocab_size} tokens on {source}", min(total["bytes"], LEARNED_BYTES)
            )
            given = train_tokenizer(_texts(job, units, whole, total["bytes"], progress), vocab_size=vocab_size)
        scratch = out / ".tokenizer.json"
        given.save(scratch)
        write_whole(file, scratch.read_bytes())
        scratch.unlink()
    tokenizer = load_tokenizer(file)
    numbers = [n for n in range(len(units)) if not record(job, "tokens", n).is_file()]
    size = sum(surveys[n]["bytes"] for n in numbers)
    done = f", {len(units) - len(numbers)} of {len(units)} units are done" if len(numbers) < len(units) else ""
    progress.begin(f"encoding {size / 1e6:.1f} MB of text{done}", size)
    perform_all(
        [_Task(job, n, units[n], str(file), whole) for n in numbers],
        _perform,
        workers=min(workers, len(numbers)),
        advance=progress.advance,
    )
    _finish(job, len(units), plan, total, skipped, whole, tokenizer)


def _perform(task: _Task, advance: Advance) -> None:
    if task.tokenizer is None:
        survey_unit(task.job, task.number, task.unit, advance)
    else:
        encode_unit(task.job, task.number, task.unit, task.whole, _loaded(task.tokenizer), advance)


@lru_cache(maxsize=1)
def _loaded(path: str) -> Tokenizer:
    return load_tokenizer(path)


def _texts(job: Job, units: list[list[Part]], whole: bool, size: int, progress: Progress) -> Iterator[str]:
    """Yield training text to learn from: all, or of more than that the beginnings of units spread over all."""
    chosen = units
    if size > LEARNED_BYTES and len(units) > _LEARNED_UNITS:
        chosen = [units[n * len(units) // _LEARNED_UNITS] for n in range(_LEARNED_UNITS)]
    share = LEARNED_BYTES // len(chosen) if size > LEARNED_BYTES else size
    for unit in chosen:
        left = share
        for document in documents(job, unit, Counter()):
            text, _ = split(document.text, job.validation, whole=whole)
            for piece in pieces(text) if text else ():
                count = len(piece.encode())
                progress.advance(count)
                yield without_long_words(piece)
                left -= count
                if left <= 0:
                    break
            if left <= 0:
                break
    progress.advance(max(0, progress.total - progress.done))


def _finish(
    job: Job,
    units: int,
    plan: dict[str, Any],
    total: Counter[str],
    skipped: Counter[str],
    whole: bool,
    tokenizer: Tokenizer,
) -> None:
    """Write the index, which makes the folder complete, and remove what only the way there needed."""
    records = [json.loads(record(job, "tokens", n).read_bytes()) for n in range(units)]
    shards = {side: [r[side] for r in records if r[side] is not None] for side in SIDES}
    described = json.dumps(plan).encode()
    sources: dict[str, Any] = {"plan": hashlib.sha256(described).hexdigest(), "unit": plan["unit"]}
    sources |= {"files": [entry[:2] for entry in plan["files"]]}
    write_whole(job.out / "sources.json", json.dumps(sources, indent=1))
    index = {
        "format": "danlu tokens",
        "version": FORMAT,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "vocab_size": tokenizer.vocab_size,
        "end": tokenizer.end,
        "tokenizer": tokenizer.sha256,
        "split": "documents" if whole else "tails",
        "share": job.validation,
        "documents": total["documents"],
        "bytes": total["bytes"],
        "skipped": dict(sorted(skipped.items())),
        "sources": "sources.json",
        **{f"{side}_{what}": sum(e[what] for e in shards[side]) for side in SIDES for what in ("tokens", "bytes")},
        **{f"{side}_documents": sum(e["documents"] for e in shards[side]) for side in SIDES},
        **shards,
    }
    write_whole(job.out / INDEX, json.dumps(index, indent=1))
    _clear(job.out)


def _clear(out: Path) -> None:
    shutil.rmtree(out / RECORDS, ignore_errors=True)
    (out / PLAN).unlink(missing_ok=True)
    for left in out.glob("*.part"):
        left.unlink(missing_ok=True)
