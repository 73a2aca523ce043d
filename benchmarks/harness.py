"""How every benchmark here measures: interleaved rounds, medians, ratios of the same round, growth with size.

A comparison runs its implementations in turn, round after round (A B C, A B C, ...), so that a slow minute of the
machine falls on all of them. A ratio is taken inside each round and reported as the median over rounds with its
quartiles: two medians of different minutes are never divided. Growth is the slope of log(seconds) and log(peak bytes)
over log(size).

A benchmark is a module with a ``main``::

    from benchmarks import harness

    def main() -> None:
        options = harness.options(__doc__)
        table = harness.compare("512 x 512", {"peer": peer_step, "danlu": danlu_step}, base="peer", options=options)
        growth = harness.sweep("square matrices", sizes, make_step, options=options)
        harness.write("muon", __doc__, [table, growth], options)
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import drawing
from benchmarks.machine import describe
from benchmarks.measured import Comparison, Sweep

RESULTS = Path(__file__).parent / "results"

Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long to measure and where the results go; ``quick`` is for trying a benchmark out, not for quoting it."""

    quick: bool = False
    rounds: int = 7
    warmup: int = 2
    seconds: float = 0.1
    threads: int = 2
    parts: tuple[str, ...] = ()
    cpu_time: bool = False
    out: Path | None = None

    @property
    def clock(self) -> Callable[[], float]:
        """Wall time, or this process's processor time."""
        return time.process_time if self.cpu_time else time.perf_counter


def options(description: str | None, *, parts: Sequence[str] = (), **defaults: Any) -> Options:
    """Read the command line that all benchmarks share and set the number of threads.

    A benchmark with ``parts`` can be asked for some of them; like a quick run, that writes files with ``--out`` only.
    """
    base = Options(**defaults)
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    if parts:
        parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(parts)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes; writes with --out only")
    parser.add_argument("--rounds", type=int, default=base.rounds)
    parser.add_argument("--threads", type=int, default=base.threads)
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread: for a busy machine")
    parser.add_argument("--out", type=Path, default=None, help=f"folder for JSON and PNG (default: {RESULTS.name}/)")
    given = parser.parse_args()
    chosen = tuple(getattr(given, "parts", ())) or tuple(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    threads = 1 if given.cpu_time else given.threads
    torch.set_num_threads(threads)
    rounds, warmup = (min(3, given.rounds), 1) if given.quick else (given.rounds, base.warmup)
    whole = not given.quick and chosen == tuple(parts)
    return Options(
        quick=given.quick,
        rounds=rounds,
        warmup=warmup,
        seconds=base.seconds,
        threads=threads,
        parts=chosen,
        cpu_time=given.cpu_time,
        out=given.out or (RESULTS if whole else None),
    )


def compare(
    title: str,
    runs: Mapping[str, Run],
    *,
    base: str,
    options: Options,
    work: Mapping[str, float] | None = None,
    unit: str = "",
    notes: Mapping[str, str] | None = None,
) -> Comparison:
    """Measure implementations in interleaved rounds.

    Each is called ``options.warmup`` times first; calls shorter than ``options.seconds`` are repeated inside a round
    until they fill it, and the round's figure is the mean over those calls.
    """
    if base not in runs:
        raise ValueError(f"base must be one of {', '.join(runs)}, got {base!r}")
    calls = {name: _warm(run, options) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with _no_collection():
        for _ in range(options.rounds):
            for name, run in runs.items():
                seconds[name].append(_timed(run, calls[name], options.clock))
    return Comparison(
        title=title, base=base, seconds=seconds, work=dict(work or {}), unit=unit, notes=dict(notes or {})
    )


def sweep(
    title: str,
    sizes: Sequence[int],
    make: Callable[[int], Mapping[str, Run]],
    *,
    options: Options,
    axis: str = "size",
    memory: bool = True,
) -> Sweep:
    """Measure implementations at every size; ``make(size)`` may leave out one that is too slow or cannot."""
    seconds: dict[str, list[float | None]] = {}
    peaks: dict[str, list[int | None]] = {}
    for place, size in enumerate(sizes):
        runs = make(size)
        table = compare(f"{axis} {size}", runs, base=next(iter(runs)), options=options)
        for name, run in runs.items():
            for column in (seconds, peaks):
                column.setdefault(name, [None] * place)
            seconds[name].append(table.median(name))
            peaks[name].append(peak_memory(run) if memory else None)
        for column in (seconds, peaks):
            for values in column.values():
                values.extend([None] * (place + 1 - len(values)))
        del runs, run
    return Sweep(title=title, axis=axis, sizes=list(sizes), seconds=seconds, peak_bytes=peaks)


def peak_memory(run: Run) -> int | None:
    """Return the bytes that one call needs at its worst moment beyond what was held before it.

    On CUDA that is what the allocator counts. On Linux the kernel's high-water mark of resident memory is reset before
    the call, after freed memory went back to the system: everything counts, whoever allocated it (tensors, work
    buffers of the linear algebra library, Python). Memory that the process held already and only reuses does not.
    None on other systems.
    """
    run()
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.memory_allocated() > 0:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None
    run()
    return max(0, _status_bytes("VmHWM") - before)


def write(name: str, description: str | None, items: Sequence[Comparison | Sweep], options: Options) -> None:
    """Print the tables; unless the run is a quick one without ``--out``, write ``NAME.json`` and ``NAME.png`` too."""
    where = describe()
    out = Console(width=None if Console().is_terminal else 120, highlight=False)
    for item in items:
        out.print(_comparison_table(item) if isinstance(item, Comparison) else _sweep_table(item))
    out.print(f"{where['processor']}, {where['threads']} threads, load {where['load']}, {where['versions']}")
    if options.cpu_time:
        out.print("processor time of one thread, not wall time")
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": name,
        "description": " ".join((description or "").split("\n\n")[0].split()),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "rounds": options.rounds,
        "clock": "processor time" if options.cpu_time else "wall time",
        "machine": where,
        "results": [item.as_dict() for item in items],
    }
    path = options.out / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    drawing.draw(items, path.with_suffix(".png"), f"{name}: {where['processor']}, {where['threads']} threads")
    out.print(f"written: {path} and {path.with_suffix('.png').name}")


def _warm(run: Run, options: Options) -> int:
    """Call until warm and return how many calls fill ``options.seconds``."""
    for _ in range(options.warmup):
        run()
    return max(1, math.ceil(options.seconds / max(_timed(run, 1, options.clock), 1e-9)))


def _timed(run: Run, calls: int, clock: Callable[[], float]) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else None
    if synchronize:
        synchronize()
    started = clock()
    for _ in range(calls):
        run()
    if synchronize:
        synchronize()
    return (clock() - started) / calls


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def _comparison_table(item: Comparison) -> Table:
    table = Table(title=item.title, title_justify="left")
    for header in ("", "median", "min", f"{item.unit}/s", f"times {item.base}", "quartiles", ""):
        table.add_column(header, justify="left" if not header else "right")
    for name in item.seconds:
        rate, ratio = item.rate(name), item.ratio(name)
        table.add_row(
            name,
            _duration(item.median(name)),
            _duration(min(item.seconds[name])),
            "" if rate is None else f"{rate:.4g}",
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f} to {ratio.high:.2f}",
            item.notes.get(name, ""),
        )
    return table


def _sweep_table(item: Sweep) -> Table:
    table = Table(title=item.title, title_justify="left")
    table.add_column(item.axis)
    for size in [*item.sizes, "slope time", "slope memory"]:
        table.add_column(str(size), justify="right")
    for name in item.seconds:
        cells = [
            "" if s is None else _duration(s) + ("" if b is None else f"\n{b / 2**20:.1f} MiB")
            for s, b in zip(item.seconds[name], item.peak_bytes[name], strict=True)
        ]
        table.add_row(name, *cells, *(f"{slope:.2f}" for slope in item.slopes(name)))
    return table


def _duration(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
