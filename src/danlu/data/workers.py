"""Tasks shared by processes: each takes the next when it is done with one, and none outlives the one that asked."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["perform_all"]

Advance = Callable[[int], None]
Perform = Callable[[Any, Advance], None]

_LOOK = 0.2  # seconds between two looks at whether the work is still wanted
_TELL = 0.3  # seconds between two words about how far a task is


def perform_all(tasks: Iterable[Any], perform: Perform, *, workers: int, advance: Advance) -> None:
    """Call ``perform(task, advance)`` for each task, in no fixed order; return when all are done.

    Args:
        tasks: what can be pickled.
        perform: a function of a module.
        workers: processes; 0 does the work in this one.
        advance: told how far the tasks are, together; what it raises ends the work within a second.

    Raises:
        ChildProcessError: a process was killed.
        Exception: what a task raised; the others are given up.
    """
    if workers == 0:
        for task in tasks:
            perform(task, advance)
        return
    # Neither threads nor locks of this process are inherited, and what is imported is imported once.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([perform.__module__])
    waiting = iter(tasks)
    processes: dict[Connection, Any] = {}
    try:
        for task in _first(waiting, workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, perform), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            ours.send(task)
        busy = set(processes)
        while busy:
            advance(0)
            for ours in wait(list(busy), _LOOK):
                assert isinstance(ours, Connection)
                try:
                    done, error = ours.recv()
                except (EOFError, ConnectionResetError):
                    raise ChildProcessError(_ended(processes[ours])) from None
                if error is not None:
                    raise error
                advance(done)
                if done == 0:
                    following = [*_first(waiting, 1)]
                    if following:
                        ours.send(following[0])
                    else:
                        busy.remove(ours)
    finally:
        for process in processes.values():
            process.terminate()
        for ours, process in processes.items():
            process.join()
            ours.close()


def _first(tasks: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        try:
            yield next(tasks)
        except StopIteration:
            return


def _ended(process: Any) -> str:
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
        hint = "; memory may be short: fewer workers need less" if -code == signal.SIGKILL else ""
        return f"a worker process was ended by signal {-code}{hint}"
    return f"a worker process ended with exit code {code}"


def _serve(conn: Connection, perform: Perform) -> None:
    """Do what is asked over a pipe until its other end is gone."""
    # Ctrl-C reaches the whole group; the process that asked decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    told, counted = time.monotonic(), 0

    def advance(count: int) -> None:
        nonlocal told, counted
        counted += count
        if counted and time.monotonic() - told > _TELL:
            conn.send((counted, None))
            told, counted = time.monotonic(), 0

    try:
        while True:
            task = conn.recv()
            try:
                perform(task, advance)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                conn.send((0, _portable(error)))
                continue
            if counted:
                conn.send((counted, None))
                counted = 0
            conn.send((0, None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # nobody waits for the work any more


def _portable(error: Exception) -> Exception:
    """An error as another process can raise it: of the kinds that say that the input is wrong, or as a sentence."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    text = "; ".join([str(error), *getattr(error, "__notes__", ())])
    for kind in (ValueError, TypeError, ImportError):
        if isinstance(error, kind):
            return kind(text)
    return RuntimeError(f"{type(error).__name__}: {text}")
