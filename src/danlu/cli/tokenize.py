"""``danlu tokenize``: text as a folder of tokens, by all cores, which a training opens at once."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

USAGE = "danlu tokenize PATH ... --out DIR [options]\n       danlu tokenize --check DIR"

ABOUT = """\
Write the tokens of text files, folders and globs into a folder: `danlu train lm --data DIR` opens it at once, whatever
its size. Interrupted or killed, the same command goes on where it was. The result does not depend on --workers."""

EXAMPLES = """\
  danlu tokenize web/*.jsonl.zst --out web.tokens --vocab-size 32768
  danlu tokenize code/ --out code.tokens --tokenizer web.tokens/tokenizer.json
  danlu train lm --data web.tokens
  danlu tokenize --check web.tokens                    read every shard again and compare its SHA-256"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("paths", metavar="PATH", nargs="*", help="files (.txt, .jsonl, .parquet, .zst, ...), folders")
    parser.add_argument("--out", metavar="DIR", help="the folder to write, or to go on with")
    parser.add_argument("--check", metavar="DIR", help="verify a folder that was written")
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default: {cores})")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json (default: one is trained on the text)")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="tokens of the vocabulary that is trained (default: 4096)"
    )
    parser.add_argument(
        "--validation", type=float, default=0.05, metavar="SHARE", help="kept from training (default: 0.05)"
    )
    parser.add_argument("--field", default="text", metavar="NAME", help="key or column of the text (default: text)")
    parser.add_argument("--errors", default="strict", choices=("strict", "replace"), help="for what is not UTF-8")


def run(arguments: argparse.Namespace) -> int:
    """Tokenize or check; 1 if what was checked is damaged."""
    if arguments.check is not None:
        if arguments.paths or arguments.out:
            raise ValueError("--check takes a folder and nothing else")
        return _check(Path(arguments.check))
    if not arguments.paths or not arguments.out:
        raise ValueError("danlu tokenize needs files to read and a folder to write: danlu tokenize PATH ... --out DIR")
    if arguments.tokenizer and arguments.vocab_size:
        raise ValueError("--vocab-size is for a tokenizer that is trained, and --tokenizer gives one; choose one")
    if arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}")
    from danlu.data import tokenize

    began, out = time.monotonic(), arguments.out
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        index = tokenize(
            arguments.paths,
            out,
            workers=arguments.workers,
            tokenizer=arguments.tokenizer,
            vocab_size=arguments.vocab_size or 4096,
            validation=arguments.validation,
            field=arguments.field,
            errors=arguments.errors,
        )
    except (KeyboardInterrupt, SystemExit):
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    from danlu.data.corpus import left_out

    if index["skipped"]:
        print(f"Left out: {left_out(index['skipped'])}.")
    seconds = time.monotonic() - began
    print(
        f"{out}: {index['train_tokens']:,} tokens to train on and {index['validation_tokens']:,} held out, "
        f"of {index['documents']:,} documents and {index['bytes'] / 1e6:.1f} MB, in {seconds:.0f} s\n"
        f"Train on them with: danlu train lm --data {out}"
    )
    return 0


def _check(folder: Path) -> int:
    from danlu.data.preparing import Progress, prepare
    from danlu.data.tokenized import check

    def work(progress: Progress) -> list[str]:
        progress.begin(f"checking {folder}", sum(file.stat().st_size for file in folder.glob("*.bin")))
        return check(folder, progress.advance)

    found = prepare(work)
    for line in found:
        print(f"damaged: {line}", file=sys.stderr)
    if not found:
        print(f"{folder} is what was written")
    return 1 if found else 0


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
