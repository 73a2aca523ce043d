"""Every method's headline figures, measured again on the machine at hand: ``danlu verify``.

One file per method, named as the method's own file and with a tuple ``CLAIMS`` of `Claim`; one line per method below.
The line gives the room, which is also where the method's page is: ``docs/<room>/<method>.md``. Modules are imported
when they are asked for, so that listing the names costs nothing.

>>> methods() == sorted(REGISTRY)
True
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
    "REGISTRY",
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

# method -> room
REGISTRY: dict[str, str] = {
    "activation": "nn",
    "amos": "optim",
    "attention": "analysis",
    "auxiliary_loss": "nn",
    "balance": "nn",
    "bounds": "approx",
    "clip": "optim",
    "codec": "diffusion",
    "composition": "approx",
    "denoising": "objectives",
    "drop_token": "objectives",
    "dynamic_experts": "nn",
    "flow_matching": "objectives",
    "fourier": "distributions",
    "gradients": "analysis",
    "kv_shared": "nn",
    "lion": "optim",
    "loraplus": "optim",
    "lowrank": "linalg",
    "masked_image": "objectives",
    "masked_lm": "objectives",
    "masks": "nn",
    "mclip": "linalg",
    "meanflow": "objectives",
    "minimax": "approx",
    "mla": "nn",
    "moe": "nn",
    "msign": "linalg",
    "muon": "optim",
    "mup": "optim",
    "recurrent": "nn",
    "rotary": "nn",
    "sampler": "diffusion",
    "scaling": "analysis",
    "schedule": "diffusion",
    "schedules": "optim",
    "score_matching": "objectives",
    "sgd": "analysis",
    "sid": "objectives",
    "sparse_parity": "analysis",
    "spectral": "linalg",
    "ssm": "nn",
    "tiger": "optim",
    "upsample_guidance": "diffusion",
}

_EXAMPLES = """examples:
  danlu verify                 measure every claim that takes less than five seconds
  danlu verify mla moe         the claims of two methods
  danlu verify mla/cache-lite  one claim
  danlu verify --list          what there is, without measuring
  danlu verify --slow --json claims.json
"""


def methods() -> list[str]:
    """Return the names of all methods that have claims."""
    return sorted(REGISTRY)


def claims(method: str) -> tuple[Claim, ...]:
    """Return the claims of one method, importing its module.

    Raises:
        ValueError: the method is not registered; the nearest name is given.
    """
    if method not in REGISTRY:
        raise ValueError(_unknown(method, methods()))
    found: tuple[Claim, ...] = importlib.import_module(f"{__name__}.{method}").CLAIMS
    return found


def select(names: Sequence[str] = ()) -> Iterator[tuple[str, Claim]]:
    """Yield ``(full name, claim)`` for methods (``mla``) and single claims (``mla/cache-lite``); all without names.

    Raises:
        ValueError: a name is unknown; the nearest one is given.
    """
    for name in names or methods():
        method, _, wanted = name.partition("/")
        named = {f"{method}/{claim.name}": claim for claim in claims(method)}
        if wanted and name not in named:
            raise ValueError(_unknown(name, list(named)))
        yield from ((full, claim) for full, claim in named.items() if not wanted or full == name)


class _Parser(argparse.ArgumentParser):
    """argparse whose refusal is one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"danlu verify: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``danlu verify`` and return its exit code: 0 all hold, 1 at least one does not, 2 bad arguments."""
    parser = _Parser(
        prog="danlu verify",
        description="Measure the methods' stated figures here, each beside a wrong variant that has to fail.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods or single claims (default: all)")
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
        return _refuse(str(problem))
    if options.list:
        console().print(list_table(chosen))
        return 0
    if options.json is not None and not options.json.resolve().parent.is_dir():
        return _refuse(f"--json {options.json}: there is no folder {options.json.resolve().parent}")
    # A single claim that is asked for by its full name is measured however long it takes.
    asked = set(options.names)
    results: list[Result] = []
    left_out = 0
    with console(stderr=True).status("measuring") as status:
        for name, claim in chosen:
            if claim.slow and not options.slow and name not in asked:
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
            return _refuse(f"--json {path}: {problem.strerror}")
    return 0 if held == len(results) else 1


def _unknown(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    hint = f"; did you mean {close!r}?" if close else ""
    return f"no claim is called {name!r}{hint} (danlu verify --list shows them all)"


def _refuse(message: str) -> int:
    print(f"danlu verify: {message}", file=sys.stderr)
    return 2
