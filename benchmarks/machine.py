"""The machine that a benchmark ran on, as part of its result."""

import contextlib
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def describe() -> dict[str, Any]:
    """Describe what measured: processor, threads, load, versions, and the matrix-multiply rates reached just now."""
    versions = {}
    for package in ("danlu", "torch", "transformers", "numpy", "scipy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "gemm_gflops_2048x512x1376": gemm_rates(),
    }


def gemm_rates(m: int = 2048, k: int = 512, n: int = 1376) -> dict[str, float]:
    """GFLOP/s of ``(m, k) @ (k, n)`` on the CPU: float32 by default and "medium" precision, and bfloat16."""
    held = torch.get_float32_matmul_precision()
    rates = {}
    for name, dtype, precision in (
        ("float32", torch.float32, "highest"),
        ("float32 medium", torch.float32, "medium"),
        ("bfloat16", torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        torch.mm(a, b)
        rates[name] = round(2e-9 * m * k * n / min(_seconds(a, b) for _ in range(8)), 1)
    torch.set_float32_matmul_precision(held)
    return rates


def _seconds(a: Tensor, b: Tensor) -> float:
    started = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - started


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
