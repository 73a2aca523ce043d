"""Which arithmetic and how many threads are fastest here without losing accuracy: measured once, then remembered.

PyTorch's default float32 matrix product is the right choice on some processors and half as fast as it could be on
others: with :func:`torch.set_float32_matmul_precision` at ``"medium"`` a recent AMD processor runs a float32 kernel
about twice as fast, while a processor with matrix tiles (AMX) computes in bfloat16 and loses sixteen bits. So nothing
is assumed: a probe of well under a second measures the speed and the error of each, and a faster setting is taken
only if its error stays that of float32. The result is kept on disk per machine, in the cache folder.
"""

import dataclasses
import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from danlu._cache import cache_folder
from danlu._validate import choice, integer
from danlu.linalg._kernels import BFLOAT16_GAIN, remember, seconds

__all__ = [
    "FLOAT32_ERROR",
    "FLOAT32_GAIN",
    "Policy",
    "Probe",
    "Rate",
    "available_threads",
    "choose",
    "probe",
]

FLOAT32_ERROR = 2e-6
"""Largest relative (Frobenius) error of a product that still counts as float32; sums of 640 terms reach 3e-7."""

FLOAT32_GAIN = 1.2
"""How much faster another float32 kernel must be before it replaces the default: less is within a probe's noise."""

_SIZE = {"cpu": 640, "cuda": 4096}
_BUDGET = 0.6  # seconds of measuring, over all candidates


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One way to multiply matrices: ``gflops`` in 1e9 floating-point operations per second, ``error`` relative."""

    dtype: str
    precision: str
    gflops: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured: the device's name, the threads used on a CPU, and the rates."""

    device: str
    name: str
    threads: int
    rates: tuple[Rate, ...]

    def rate(self, dtype: str, precision: str = "highest") -> Rate:
        """Return the measured rate of ``dtype`` under ``precision``."""
        return next(r for r in self.rates if (r.dtype, r.precision) == (dtype, precision))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The arithmetic of a run.

    ``dtype`` is the type of activations and of the matrices they meet (weights stay float32), ``matmul_precision``
    the argument of :func:`torch.set_float32_matmul_precision`, ``gflops`` the measured rate under each dtype's name.
    """

    device: torch.device
    dtype: torch.dtype
    matmul_precision: str
    threads: int
    gflops: dict[str, float]
    name: str

    @property
    def rate(self) -> float:
        """Floating-point operations per second of the chosen dtype's matrix product."""
        return self.gflops[str(self.dtype).removeprefix("torch.")] * 1e9

    def apply(self) -> None:
        """Set this process's number of threads and float32 matrix precision."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.matmul_precision)

    def sentence(self) -> str:
        """Return the choice in words."""
        kind = str(self.dtype).removeprefix("torch.")
        rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in self.gflops.items())
        threads = f" on {self.threads} thread{'s' * (self.threads != 1)}" if self.device.type == "cpu" else ""
        return (
            f"{self.name}: computes in {kind}{threads}, float32 products at precision {self.matmul_precision!r} "
            f"(measured, GFLOP/s: {rates})."
        )


def available_threads() -> int:
    """Return the number of threads to compute with: physical cores this process may use, shared by local ranks.

    A number set by ``OMP_NUM_THREADS`` is respected, except the 1 that ``torchrun`` sets when nobody set anything.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0 and not (asked == "1" and local_ranks > 1):
        return int(asked)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_siblings(cpu) for cpu in usable}
    return max(1, min(len(cores), _quota()) // local_ranks)


def probe(device: torch.device | str = "cpu", *, threads: int | None = None, refresh: bool = False) -> Probe:
    """Measure the matrix products of ``device``, or return what was measured here before.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads to measure with; None takes :func:`available_threads`.
        refresh: measure again and replace what is remembered.

    Raises:
        ValueError: the device is neither, or ``threads`` is below one.
    """
    device = torch.device(device)
    choice("device", device.type, ("cpu", "cuda"))
    threads = available_threads() if threads is None else threads
    integer("threads", threads)
    name = _device_name(device)
    # Kernels may be held below what the processor has.
    allowed = [torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA")]
    processor = [platform.machine(), _cpu_flags(), *allowed]
    signature = json.dumps([1, torch.__version__, device.type, name, threads, *processor])
    path = cache_folder() / f"device-{hashlib.sha256(signature.encode()).hexdigest()[:16]}.json"
    if not refresh:
        try:
            known = json.loads(path.read_text())
            return Probe(**{**known, "rates": tuple(Rate(**r) for r in known["rates"])})
        except (OSError, ValueError, TypeError, KeyError):
            pass  # absent, unreadable or of an older layout: measure
    measured = Probe(device=device.type, name=name, threads=threads, rates=_measure(device, threads))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(measured), indent=2))
        temporary.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs the next start half a second, no more
    return measured


def choose(
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    *,
    device: Literal["auto", "cpu", "cuda"] | torch.device = "auto",
    threads: int | None = None,
    refresh: bool = False,
) -> Policy:
    """Choose the arithmetic of a run.

    Args:
        precision: ``"float32"`` and ``"bfloat16"`` are taken at their word; ``"auto"`` takes bfloat16 on a GPU that
            has it and, on a CPU, where it was measured at least 1.25 times as fast as the best float32.
        device: ``"auto"`` takes a GPU if there is one.
        threads: CPU threads; None takes :func:`available_threads`.
        refresh: measure again.

    Raises:
        ValueError: an argument is none of those, or CUDA is asked for where there is none.

    >>> choose("float32", device="cpu", threads=1).dtype
    torch.float32
    """
    choice("precision", precision, ("auto", "float32", "bfloat16"))
    if not isinstance(device, torch.device):
        choice("device", device, ("auto", "cpu", "cuda"))
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, and PyTorch finds no CUDA device here; accepted: 'cpu', 'auto'")
    found = probe(device, threads=threads, refresh=refresh)
    best = found.rate("float32")
    for other in found.rates:
        if other.dtype == "float32" and other.error <= FLOAT32_ERROR and other.gflops > FLOAT32_GAIN * best.gflops:
            best = other
    half = found.rate("bfloat16")
    faster: Literal["float32", "bfloat16"] = "bfloat16" if half.gflops > BFLOAT16_GAIN * best.gflops else "float32"
    # What is computed in either (a matrix sign, say) follows this measurement, not one of its own: it is kept on disk,
    # so a resumed run repeats its arithmetic.
    remember(device, getattr(torch, faster))
    if precision == "auto":
        precision = faster
    matmul_precision = best.precision
    if device.type == "cuda" and precision == "bfloat16":
        matmul_precision = "high"  # what stays float32 beside bfloat16 activations may as well use TF32
    return Policy(
        device=device,
        dtype=getattr(torch, precision),
        matmul_precision=matmul_precision,
        threads=found.threads,
        gflops={"float32": best.gflops, "bfloat16": half.gflops},
        name=found.name,
    )


def _measure(device: torch.device, threads: int) -> tuple[Rate, ...]:
    """Time each candidate in turn, round after round, and keep its best: other programs disturb all alike."""
    size = _SIZE[device.type]
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator) for _ in range(2))
    rows = slice(0, 64)  # the error of a few rows tells as much as that of all
    exact = left[rows].double() @ right.double()
    candidates = [
        (torch.float32, "highest"),
        (torch.float32, "medium" if device.type == "cpu" else "high"),
        (torch.bfloat16, "highest"),
    ]
    pairs = {dtype: (left.to(dtype), right.to(dtype)) for dtype, _ in candidates}
    best = [float("inf")] * len(candidates)
    errors = [0.0] * len(candidates)
    try:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        for turn in range(12):
            for i, (dtype, precision) in enumerate(candidates):
                torch.set_float32_matmul_precision(precision)
                a, b = pairs[dtype]
                if turn == 0:
                    errors[i] = float(((a @ b)[rows].double() - exact).norm() / exact.norm())
                else:
                    best[i] = min(best[i], seconds(a, b))
            if turn and time.perf_counter() - start > _BUDGET:
                break
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
    return tuple(
        Rate(dtype=str(d).removeprefix("torch."), precision=p, gflops=2e-9 * size**3 / best[i], error=errors[i])
        for i, (d, p) in enumerate(candidates)
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> str:
    return hashlib.sha256(_cpuinfo("flags").encode()).hexdigest()[:8]


def _cpuinfo(key: str) -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
    except OSError:
        return ""


def _siblings(cpu: int) -> str:
    """The hardware threads that share ``cpu``'s core: two of them on one core only take turns in a product."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """The processors a container's time quota amounts to."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(limit) // int(period))
    except (OSError, ValueError):
        return os.cpu_count() or 1
