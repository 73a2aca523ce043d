"""Minimax polynomials of |x|, Runge's function and exp on [-1, 1], beside baryrat's ``bpane`` and ``brasil``.

Parts: ``speed`` (degrees 5, 10 and 20; a peer enters where its answer is within a millionth of the optimum) and
``quality`` (57 problems, degrees 2 to 20: gap to the proven lower bound and processor time of each; exp at degree 20
with 40 digits).
"""

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable

import mpmath
import numpy as np
from numpy.typing import NDArray

from benchmarks import harness
from danlu.approx import minimax

PARTS = ("quality", "speed")
Array = NDArray[np.float64]
Function = Callable[[Array], Array]


def runge(x: Array) -> Array:
    """1 / (1 + 25 x^2)."""
    return np.asarray(1 / (1 + 25 * x * x))


def runge_slope(x: Array) -> Array:
    """Derivative of Runge's function."""
    return np.asarray(-50 * x * runge(x) ** 2)


FUNCTIONS: dict[str, Function] = {"abs": np.abs, "runge": runge, "exp": np.exp}
SLOPES: dict[str, Function] = {"abs": np.sign, "runge": runge_slope, "exp": np.exp}


def peers(name: str, degree: int) -> dict[str, Callable[[], Function]]:
    """Solvers of the installed peers; each returns what it found, as a function."""
    if importlib.util.find_spec("baryrat") is None:
        return {}
    import baryrat

    f, slope = FUNCTIONS[name], SLOPES[name]
    return {
        "baryrat bpane": lambda: baryrat.bpane(f, slope, (-1, 1), degree, tol=1e-7, maxiter=500),
        "baryrat brasil": lambda: baryrat.brasil(f, (-1, 1), (degree, 0), tol=1e-7),
    }


def excess(found: Function, f: Function, optimum: float) -> float:
    """How far the largest error of an answer is above the optimum, relative."""
    x = np.linspace(-1, 1, 40_001)
    return float(np.max(np.abs(np.asarray(found(x)) - f(x)))) / optimum - 1


def speed(options: harness.Options) -> list[harness.Comparison]:
    """Compare the solvers that solve each problem."""
    tables = []
    for name, f in FUNCTIONS.items():
        for degree in (5, 10, 20):
            best = minimax(f, degree)
            runs: dict[str, Callable[[], object]] = {"danlu": lambda f=f, degree=degree: minimax(f, degree)}
            for peer, solve in peers(name, degree).items():
                with warnings.catch_warnings(), np.errstate(all="ignore"):
                    warnings.simplefilter("ignore")
                    try:
                        above = excess(solve(), f, best.error)
                    except Exception as problem:  # a peer that fails is a result, whatever it raises
                        print(f"{name} {degree}: {peer} fails: {problem}", flush=True)
                        continue
                if above < 1e-6:
                    runs[peer] = solve
                else:
                    print(f"{name} {degree}: {peer} ends {above:.1e} above the optimum", flush=True)
            tables.append(harness.compare(f"{name}, degree {degree}", runs, base="danlu", options=options))
    return tables


def quality() -> None:
    """Solve every problem and print its gap and the median processor time of five calls."""
    times, gaps = [], []
    for name, f in FUNCTIONS.items():
        for degree in range(2, 21):
            best = minimax(f, degree)
            seconds = []
            for _ in range(5):
                started = time.process_time()
                minimax(f, degree)
                seconds.append(time.process_time() - started)
            times.append(statistics.median(seconds))
            gaps.append(max(best.error - best.lower_bound - best.rounding, 0) / best.error)
            print(f"{name:6s} {degree:3d}  {best.error:.7e}  gap {best.gap:.1e}  {1e3 * times[-1]:.2f} ms", flush=True)
    print(f"largest gap beyond rounding {max(gaps):.1e}; median {1e3 * statistics.median(times):.2f} ms", end=", ")
    print(f"longest {1e3 * max(times):.2f} ms, above 5 ms: {sum(t > 5e-3 for t in times)} of {len(times)}")
    started = time.process_time()
    extended = minimax(mpmath.exp, 20, dps=40)
    seconds = time.process_time() - started
    print(f"exp, degree 20, 40 digits: {mpmath.nstr(extended.error, 7)}, gap {extended.gap:.0e}, {seconds:.2f} s")


def main() -> None:
    """Measure the parts asked for."""
    options = harness.options(__doc__, parts=PARTS, rounds=5, warmup=1)
    if "quality" in options.parts:
        quality()
    if "speed" in options.parts:
        harness.write("minimax", __doc__, speed(options), options)


if __name__ == "__main__":
    main()
