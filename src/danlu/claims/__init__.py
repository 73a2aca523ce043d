"""Every method's headline figures, measured again on the machine at hand: ``danlu verify``.

One file per method, ``claims/<package>/<method>.py``, with a tuple ``CLAIMS`` of `Claim`: the folder is the list of
methods, and the method's page is ``docs/<package>/<method>.md``. Modules are imported when they are asked for, so that
listing the names costs nothing.

>>> "optim/lion" in methods()
True
>>> [name for name, _ in select(["lion/decay-box"])]
['optim/lion/decay-box']
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from danlu._validate import nearest
from danlu.claims.frame import (
    Claim,
    Result,
    Tolerance,
    absolute,
    at_least,
    at_most,
    console,
    exact,
    judge,
    list_table,
    relative,
    results_table,
    write_json,
)

__all__ = [
    "Claim",
    "Result",
    "Tolerance",
    "absolute",
    "at_least",
    "at_most",
    "claims",
    "exact",
    "judge",
    "main",
    "methods",
    "relative",
    "select",
]

_FOLDER = Path(__file__).parent

_EXAMPLES = """examples:
  danlu verify                      measure every claim that takes less than five seconds
  danlu verify optim/lion nn/mla    the claims of two methods
  danlu verify lion                 the same method: its package may be left out where no other has the name
  danlu verify linalg               the claims of a package
  danlu verify nn/mla/cache-lite    one claim, however long it takes
  danlu verify --list               what there is, without measuring
  danlu verify --slow --json claims.json
"""


def methods() -> list[str]:
    """Return the names ``package/method`` of all methods that have claims."""
    files = (path for path in _FOLDER.glob("*/*.py") if path.stem != "__init__")
    return sorted(f"{path.parent.name}/{path.stem}" for path in files)


def claims(method: str) -> tuple[Claim, ...]:
    """Return the claims of one method, importing its module.

    Args:
        method: ``package/method``.

    Raises:
        ValueError: no method has this name; the nearest name is given.
    """
    known = methods()
    if method not in known:
        raise ValueError(_unknown(method, known))
    found: tuple[Claim, ...] = importlib.import_module(f"{__name__}.{method.replace('/', '.')}").CLAIMS
    return found


def select(names: Sequence[str] = ()) -> Iterator[tuple[str, Claim]]:
    """Yield ``(package/method/claim, claim)`` for each name; all claims without names.

    Args:
        names: of methods (``optim/lion``), packages (``optim``) or single claims (``optim/lion/decay-box``). The
            package may be left out where only one has a method of that name.

    Raises:
        ValueError: a name is unknown, and the nearest one is given, or two packages have a method of that name.
    """
    known = methods()
    for name in names or known:
        head, _, last = name.rpartition("/")
        one = _method(name)
        if paths := [one] if one else [path for path in known if path.startswith(f"{name}/")]:
            yield from ((f"{path}/{claim.name}", claim) for path in paths for claim in claims(path))
        elif one := _method(head):
            named = {claim.name: claim for claim in claims(one)}
            if last not in named:
                raise ValueError(_unknown(name, [f"{one}/{word}" for word in named]))
            yield f"{one}/{last}", named[last]
        else:
            raise ValueError(_unknown(name, [*known, *(path.partition("/")[2] for path in known)]))


def _method(name: str) -> str | None:
    """Return the ``package/method`` that is called ``name``, with or without its package."""
    found = [path for path in methods() if f"/{path}".endswith(f"/{name}")]
    if len(found) > 1:
        raise ValueError(f"{name!r} is the name of several methods: {', '.join(found)}")
    return found[0] if found else None


class _Parser(argparse.ArgumentParser):
    """argparse whose error is one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"danlu verify: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``danlu verify`` and return its exit code: 0 all hold, 1 at least one does not, 2 bad arguments."""
    parser = _Parser(
        prog="danlu verify",
        description="Reproduce the figures that the methods' papers state. Each is beside a negative control,\n"
        "the same measurement of a wrong variant, which has to fail.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods, packages or single claims (default: all)")
    parser.add_argument("--list", action="store_true", help="show the claims without measuring them")
    parser.add_argument("--slow", action="store_true", help="measure the claims above five seconds too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE as well")
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        chosen = list(select(options.names))
    except ValueError as problem:
        return _reject(str(problem))
    if options.list:
        console().print(list_table(chosen))
        return 0
    if options.json is not None and not options.json.resolve().parent.is_dir():
        return _reject(f"--json {options.json}: there is no folder {options.json.resolve().parent}")
    # A single claim that is asked for by its full name is measured however long it takes.
    results: list[Result] = []
    left_out = 0
    with console(stderr=True).status("measuring") as status:
        for name, claim in chosen:
            asked = any(f"/{name}".endswith(f"/{word}") for word in options.names)
            if claim.slow and not options.slow and not asked:
                left_out += 1
                continue
            status.update(f"{name} (about {claim.seconds:g} s)")
            results.append(judge(name, claim))
    return _report(results, left_out, options.json)


def _report(results: Sequence[Result], left_out: int, path: Path | None) -> int:
    out = console()
    out.print(results_table(results))
    held = sum(result.verdict == "holds" for result in results)
    slow = f"; {left_out} slow ones left out (--slow)" if left_out else ""
    out.print(f"{held} of {len(results)} claims hold{slow}")
    if path is not None:
        try:
            write_json(path, results)
        except OSError as problem:
            return _reject(f"--json {path}: {problem.strerror}")
    return 0 if held == len(results) else 1


def _unknown(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    hint = f"; did you mean {close!r}?" if close else ""
    return f"no claim is called {name!r}{hint} (danlu verify --list shows them all)"


def _reject(message: str) -> int:
    print(f"danlu verify: {message}", file=sys.stderr)
    return 2
