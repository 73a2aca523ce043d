"""Whether a device multiplies matrices faster in bfloat16 than in float32, measured once per process."""

import time

import torch
from torch import Tensor

BFLOAT16_GAIN = 1.25
"""Least speed-up at which the bfloat16 product is chosen, because it also costs accuracy and casts."""

_SIZE = 384
_ROUNDS = 5
_KNOWN: dict[str, torch.dtype] = {}


def seconds(left: Tensor, right: Tensor) -> float:
    """Return how long one product of two matrices takes."""
    if left.device.type == "cuda":
        torch.cuda.synchronize(left.device)
    start = time.perf_counter()
    torch.mm(left, right)
    if left.device.type == "cuda":
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - start


def remember(device: torch.device, dtype: torch.dtype) -> None:
    """Make :func:`fast_matmul_dtype` return ``dtype`` for a CPU in this process without measuring."""
    _KNOWN[device.type] = dtype


def _measure(device: torch.device) -> torch.dtype:
    best = {}
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
        seconds(matrix, matrix)
        best[dtype] = min(seconds(matrix, matrix) for _ in range(_ROUNDS))
    return torch.bfloat16 if best[torch.bfloat16] * BFLOAT16_GAIN < best[torch.float32] else torch.float32


# torch.compile takes the result as a constant instead of tracing the timer (it ignores functools.cache).
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _known(kind: str) -> torch.dtype:
    if kind not in _KNOWN:
        _KNOWN[kind] = _measure(torch.device(kind))
    return _KNOWN[kind]


def fast_matmul_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return the faster of float32 and bfloat16 for matrix products on ``device``.

    For accelerators it is bfloat16. A CPU is measured (a few milliseconds, once per process): bfloat16 is 2 to 8 times
    as fast where it is native and 4 times as slow where it is emulated, so two processes of one job agree. A result
    that `danlu.train` measured on this machine before is used instead, see :func:`remember`.

    >>> fast_matmul_dtype("cpu") in (torch.float32, torch.bfloat16)
    True
    """
    kind = torch.device(device).type
    return _known(kind) if kind == "cpu" else torch.bfloat16
