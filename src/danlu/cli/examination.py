"""``danlu doctor``: what is installed, what this machine is, what danlu chooses on it, and how fast it is."""

import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from danlu._cache import cache_folder
from danlu.train.device import Policy, choose, probe

__all__ = ["examine"]

# A probe stops after this long, so that all of them together stay well under ten seconds.
_SECONDS_A_PROBE = 0.7

_Rows = list[tuple[str, str]]


def examine() -> None:
    """Print the whole examination; the choices are measured anew and replace what was remembered."""
    _print("Versions", _versions())
    _print("Machine", _machine())
    policy = choose(refresh=True)
    policy.apply()
    _print("Chosen here", _choices(policy))
    _print("Speed", _speeds(policy))
    _print("Extras", _extras())


def _print(title: str, rows: _Rows) -> None:
    print(title, *(f"  {name:34}{text}" for name, text in rows), sep="\n", flush=True)


def _versions() -> _Rows:
    rows = [("danlu", importlib.metadata.version("danlu")), ("python", platform.python_version())]
    return rows + [(name, _installed(name) or "missing") for name, extra in _requirements() if extra is None]


def _machine() -> _Rows:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("logical processors usable", str(usable)),
        ("vector instructions", torch.backends.cpu.get_cpu_capability()),
        ("memory", _memory()),
        ("free disk here", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB"),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    return rows if torch.cuda.is_available() else [*rows, ("cuda", "none")]


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _choices(policy: Policy) -> _Rows:
    return [
        ("device", f"{policy.device} ({policy.name})"),
        ("arithmetic of a run", f"{str(policy.dtype).removeprefix('torch.')}, weights float32"),
        ("float32 products at precision", policy.matmul_precision),
        ("threads", str(policy.threads)),
        ("attention kernel", "PyTorch's scaled_dot_product_attention"),
        ("cache folder", str(cache_folder())),
    ]


def _speeds(policy: Policy) -> _Rows:
    rows = [
        (f"matmul, {r.dtype} at {r.precision!r}", f"{r.gflops:,.0f} GFLOP/s, relative error {r.error:.0e}")
        for r in probe(policy.device, threads=policy.threads).rates
    ]
    source = torch.randn(32 * 2**20, device=policy.device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), policy.device)
    rows.append(("memory, copying 128 MiB", f"{2 * source.nbytes / seconds / 1e9:.1f} GB/s read and written"))
    for dtype in (torch.float32, torch.bfloat16):
        shape = (8, 8, 256, 64)
        q, k, v = (torch.randn(shape, device=policy.device, dtype=dtype, requires_grad=True) for _ in range(3))
        seconds = _median_seconds(lambda q=q, k=k, v=v: _attend(q, k, v), policy.device)  # type: ignore[misc]
        name = str(dtype).removeprefix("torch.")
        rows.append((f"attention, {name}", f"{1000 * seconds:.1f} ms forward and backward, {_times(shape)} causal"))
    return rows


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> None:
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.autograd.grad(out, (q, k, v), out.detach())


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median time of ``work``, called three times at least and then until its time is up."""
    work()
    times: list[float] = []
    deadline = time.perf_counter() + _SECONDS_A_PROBE
    while len(times) < 3 or time.perf_counter() < deadline:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def _extras() -> _Rows:
    """Tell for each extra whether its packages are there, and the line that installs it where they are not."""
    wanted: dict[str, list[str]] = {}
    for name, extra in _requirements():
        if extra is not None:
            wanted.setdefault(extra, []).append(name)
    rows = []
    for extra, names in sorted(wanted.items()):
        missing = [name for name in names if _installed(name) is None]
        advice = f'missing {", ".join(missing)}: pip install "danlu[{extra}]"'
        rows.append((extra, advice if missing else "installed"))
    return rows


def _requirements() -> Iterator[tuple[str, str | None]]:
    """Yield the packages that danlu's own metadata names, each with the extra it belongs to or None."""
    for requirement in importlib.metadata.requires("danlu") or []:
        extra = re.search(r"extra == ['\"](.+?)['\"]", requirement)
        yield re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0], extra.group(1) if extra else None


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
