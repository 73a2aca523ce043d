"""The command line: ``danlu COMMAND ...``.

Nothing heavy is imported before a command runs, so that every ``--help`` answers at once. Input that is rejected
becomes one line on stderr and exit code 2; set ``DANLU_DEBUG=1`` to see the traceback instead.
"""

import logging
import os
import re
import sys
from collections.abc import Sequence

__all__ = ["main"]

# What is raised for input that is wrong, as opposed to code that is.
_EXPECTED = (ValueError, TypeError, OSError, ImportError)
_ALLOCATION = re.compile(r"tried to allocate (\d+) bytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after ``danlu``; None takes them from ``sys.argv``.

    Returns:
        0 when the command did its work, 1 when it failed (or ``verify`` found a claim broken), 2 when the input was
        rejected, 130 after Ctrl-C, 143 after SIGTERM.

    >>> main(["recepies"])
    2
    """
    from danlu.cli.parser import parse
    from danlu.cli.streams import open_streams, outlive_readers

    words = sys.argv[1:] if argv is None else list(argv)
    open_streams()
    try:
        arguments = parse(words)
        _show_progress()
        if words[0] not in ("train", "resume", "branch"):
            return int(arguments.run(arguments))
        with outlive_readers():
            return int(arguments.run(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has left (`danlu show lm | head`). Without this Python complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as raised:
        if os.environ.get("DANLU_DEBUG"):
            raise
        if os.environ.get("RANK", "0") != "0" and not _speaks():
            return 2  # the first of several processes says the same
        error = _as_memory_error(raised)
        expected = isinstance(error, (*_EXPECTED, FloatingPointError, MemoryError))
        where = "" if expected else f"unexpected {type(error).__name__} (DANLU_DEBUG=1 shows where): "
        print(f"danlu: {where}{_sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, _EXPECTED) else 1


def _speaks() -> bool:
    """Whether a process that is not the first one says what ended it: it was chosen to if they had met."""
    from danlu.train.distributed import joined

    return joined()


def _show_progress() -> None:
    """Print what the library logs (the first look at a corpus takes seconds) on stderr, in the first process only."""
    log = logging.getLogger("danlu")
    for handler in log.handlers:
        if isinstance(handler, _Lines):
            handler.warned.clear()
    if not log.handlers:
        main_process = os.environ.get("RANK", "0") == "0"
        log.addHandler(_Lines() if main_process else logging.NullHandler())
        log.setLevel(logging.INFO if main_process else logging.WARNING)


class _Lines(logging.Handler):
    """Prints every record as a line on stderr, whatever that is by then; a warning once in a command."""

    def __init__(self) -> None:
        super().__init__()
        self.warned: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        line = self.format(record)
        if record.levelno >= logging.WARNING:
            # A command reads a run's configuration several times.
            if line in self.warned:
                return
            self.warned.add(line)
        print(line, file=sys.stderr, flush=True)


def _as_memory_error(error: Exception) -> Exception:
    """Turn PyTorch's report of memory that it could not get, with its C++ source lines, into a sentence."""
    wanted = _ALLOCATION.search(str(error)) if isinstance(error, RuntimeError) else None
    if wanted is None:
        return error
    size = int(wanted[1])
    return MemoryError(
        f"out of memory: {size / 1e9:,.1f} GB were asked for at once; a smaller model, batch or length needs less"
    )


def _sentence(error: Exception) -> str:
    """Return the error's message and its notes as one line that a terminal may show.

    The operating system's errors lead with the file that they are about.
    """
    said = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        said = f"{error.filename}: {error.strerror}"
    text = " ".join("; ".join([said, *getattr(error, "__notes__", ())]).split()) or type(error).__name__
    # A message may quote a file, and a file may hold escape sequences.
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
