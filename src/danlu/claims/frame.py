"""What a claim is, how it is judged, and how a list of judgements is shown.

A claim is a figure that a paper, a post or a derivation states, a function that measures the same figure here, and a
**negative control**: the same measurement of a deliberately wrong variant. The control must fail the very verdict that
the measurement passes; where it does not, the claim proves nothing and is reported as broken.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

# A claim that takes longer than this many seconds is measured by ``danlu verify --slow`` only.
SLOW_SECONDS = 5.0

Kind = Literal["absolute", "relative", "at most", "at least"]
Verdict = Literal["holds", "fails", "broken control", "error"]


@dataclass(frozen=True)
class Tolerance:
    """How near to the expected figure a measured one has to be.

    ``absolute``: ``|here - expected| <= amount``. ``relative``: ``|here - expected| <= amount * |expected|``.
    ``at most`` / ``at least``: the expected figure is a bound, which may be missed by ``amount`` (in its own units).
    A value that is not finite is never accepted.

    >>> absolute(0.15).accepts(16.0, 16.1), relative(0.01).accepts(16.0, 16.2), at_most().accepts(1e-12, 2e-15)
    (True, False, True)
    """

    kind: Kind
    amount: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amount) and self.amount >= 0):
            raise ValueError(f"amount must be finite and not negative, got {self.amount!r}")

    def accepts(self, expected: float, value: float) -> bool:
        """Tell whether ``value`` is near enough to ``expected``."""
        if not math.isfinite(value):
            return False
        match self.kind:
            case "absolute":
                return abs(value - expected) <= self.amount
            case "relative":
                return abs(value - expected) <= self.amount * abs(expected)
            case "at most":
                return value <= expected + self.amount
            case "at least":
                return value >= expected - self.amount

    def __str__(self) -> str:
        match self.kind:
            case "absolute":
                return f"± {self.amount:g}" if self.amount else "exact"
            case "relative":
                return f"± {100 * self.amount:g} %"
            case _:
                return f"{self.kind}, slack {self.amount:g}" if self.amount else self.kind


def absolute(amount: float) -> Tolerance:
    """Accept a value within ``amount`` of the expected one, in its own units."""
    return Tolerance("absolute", amount)


def exact() -> Tolerance:
    """Accept the expected value only: for integers and closed forms that floating point represents."""
    return Tolerance("absolute", 0.0)


def relative(fraction: float) -> Tolerance:
    """Accept a value within ``fraction`` of the expected one's size."""
    return Tolerance("relative", fraction)


def at_most(slack: float = 0.0) -> Tolerance:
    """Accept a value no greater than the expected one (an error, a cost)."""
    return Tolerance("at most", slack)


def at_least(slack: float = 0.0) -> Tolerance:
    """Accept a value no smaller than the expected one (a gain, a rank)."""
    return Tolerance("at least", slack)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One stated figure with the two functions that put it to the test.

    Args:
        name: the claim's name inside its method, a few words joined by hyphens; with the method: ``nn/mla/cache-lite``.
        statement: one sentence that says what is measured, with its setting.
        source: where the expected figure stands (paper, section or table; post; or the derivation).
        expected: the figure, or the bound for ``at_most`` and ``at_least``.
        tolerance: built by `absolute`, `relative`, `exact`, `at_most` or `at_least`.
        measure: measures the figure here. Deterministic: it brings its own generator and seeds.
        control: the same measurement of a wrong variant. It must fail the same verdict.
        seconds: what measure and control together take on one core; above 5 the claim counts as slow.
    """

    name: str
    statement: str
    source: str
    expected: float
    tolerance: Tolerance
    measure: Callable[[], float]
    control: Callable[[], float]
    seconds: float = 1.0

    @property
    def slow(self) -> bool:
        """Whether the claim is left out of the test suite and of ``danlu verify`` without ``--slow``."""
        return self.seconds > SLOW_SECONDS


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one claim: the measured value, the control's, and the verdict over both."""

    name: str
    claim: Claim
    value: float
    control: float
    error: str
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """``holds`` only if the measured value is accepted and the control's is not."""
        accepts = self.claim.tolerance.accepts
        if self.error:
            return "error"
        if accepts(self.claim.expected, self.control):
            return "broken control"
        return "holds" if accepts(self.claim.expected, self.value) else "fails"

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON types; figures that are not finite become strings."""
        return {
            "claim": self.name,
            "statement": self.claim.statement,
            "source": self.claim.source,
            "expected": self.claim.expected,
            "tolerance": str(self.claim.tolerance),
            "here": _json_number(self.value),
            "control": _json_number(self.control),
            "verdict": self.verdict,
            "error": self.error,
            "seconds": round(self.seconds, 3),
        }


def judge(name: str, claim: Claim) -> Result:
    """Measure a claim and its control. A measurement that raises is an error, never a pass."""
    started = time.perf_counter()
    value = control = math.nan
    error = ""
    try:
        value = float(claim.measure())
        control = float(claim.control())
    except Exception as problem:  # one claim that breaks must not keep the others from being measured
        error = f"{type(problem).__name__}: {problem}"
    return Result(
        name=name, claim=claim, value=value, control=control, error=error, seconds=time.perf_counter() - started
    )


_COLOURS: dict[Verdict, str] = {"holds": "green", "fails": "red", "broken control": "magenta", "error": "red"}


def results_table(results: Sequence[Result]) -> Table:
    """Lay results out for a terminal: claim, the source's figure, here, tolerance, verdict, control."""
    table = Table(show_lines=True)
    for header, justify in (("claim", "left"), ("source's figure", "right"), ("here", "right")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    for header in ("tolerance", "verdict", "control"):
        table.add_column(header)
    for result in results:
        claim = result.claim
        table.add_row(
            Text.assemble((result.name, "bold"), "\n", claim.statement, "\n", (claim.source, "dim")),
            f"{claim.expected:.6g}",
            "-" if math.isnan(result.value) else f"{result.value:.6g}",
            str(claim.tolerance),
            Text(result.error or result.verdict, style=_COLOURS[result.verdict]),
            _control_text(result),
        )
    return table


def list_table(named: Iterable[tuple[str, Claim]]) -> Table:
    """Lay claims out without measuring them."""
    table = Table()
    for header in ("claim", "statement", "source's figure", "tolerance", "seconds"):
        table.add_column(header)
    for name, claim in named:
        seconds = f"{claim.seconds:g}" + (" (slow)" if claim.slow else "")
        table.add_row(name, claim.statement, f"{claim.expected:.6g}", str(claim.tolerance), seconds)
    return table


def write_json(path: Path, results: Sequence[Result]) -> None:
    """Write results as a JSON list. Raises OSError where the file cannot be written."""
    path.write_text(json.dumps([result.as_dict() for result in results], indent=1) + "\n", encoding="utf-8")


def console(*, stderr: bool = False) -> Console:
    """Return a console that is wide enough for the table where the output is no terminal."""
    plain = Console(stderr=stderr, highlight=False)
    return plain if plain.is_terminal else Console(stderr=stderr, highlight=False, width=140)


def _control_text(result: Result) -> Text:
    if result.verdict == "error" or math.isnan(result.control):
        return Text("not a number" if not result.error else "-")
    if result.verdict == "broken control":
        return Text(f"{result.control:.6g} passes too", style="magenta")
    return Text(f"{result.control:.6g} rejected")


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
