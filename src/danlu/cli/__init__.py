"""The front door: ``danlu VERB ...``.

Nothing heavy is imported before a verb runs, so that every ``--help`` answers at once. Whatever a room refuses becomes
one line on stderr and exit code 2; set ``DANLU_DEBUG=1`` to see the traceback instead.
"""

import logging
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

# What the rooms raise for input that is wrong, as opposed to code that is.
_REFUSALS = (ValueError, TypeError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after ``danlu``; None takes them from ``sys.argv``.

    Returns:
        0 when the verb did its work, 1 when it failed (or ``verify`` found a claim broken), 2 when the input was
        refused, 130 after Ctrl-C.

    >>> main(["recepies"])
    2
    """
    from danlu.cli.parser import parse

    try:
        arguments = parse(sys.argv[1:] if argv is None else list(argv))
        _show_progress()
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
    except Exception as error:
        if os.environ.get("DANLU_DEBUG"):
            raise
        expected = isinstance(error, (*_REFUSALS, FloatingPointError))
        where = "" if expected else f"unexpected {type(error).__name__} (DANLU_DEBUG=1 shows where): "
        print(f"danlu: {where}{_sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, _REFUSALS) else 1


def _show_progress() -> None:
    """Let the rooms say what they are busy with (the first look at a corpus takes seconds), on stderr, once."""
    log = logging.getLogger("danlu")
    if not log.handlers and os.environ.get("RANK", "0") == "0":
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)


def _sentence(error: Exception) -> str:
    """Return the error's message as one line; the operating system's errors lead with the file they are about."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
