"""Which arithmetic multiplies matrices fastest on a device, found by a short cached probe."""

import time

import torch

# A tie must not flip between two runs of one job (a resumed run has to repeat its arithmetic), so bfloat16 has to win
# clearly. Where it is native it wins by 2 to 8; where it is emulated it loses by about 4.
_CLEARLY = 1.5
_SIZE = 384
_ROUNDS = 5


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Return the time of one ``_SIZE`` cubed product in ``dtype``: the minimum over a few rounds."""
    left = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    out = torch.empty_like(left)
    torch.mm(left, left, out=out)
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        torch.mm(left, left, out=out)
        times.append(time.perf_counter() - start)
    return min(times)


_MEASURED: dict[str, torch.dtype] = {}


# A compiler takes the answer for a constant instead of tracing the clock (and ignores functools.cache).
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _measured(kind: str) -> torch.dtype:
    if kind not in _MEASURED:
        device = torch.device(kind)
        faster = _seconds(torch.bfloat16, device) * _CLEARLY < _seconds(torch.float32, device)
        _MEASURED[kind] = torch.bfloat16 if faster else torch.float32
    return _MEASURED[kind]


def fast_matmul_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return the faster of float32 and bfloat16 for matrix products on ``device``.

    Accelerators answer bfloat16 at once. A CPU is measured (a few milliseconds, once a process): processors without
    bfloat16 units emulate it several times slower than float32.

    >>> fast_matmul_dtype("cpu") in (torch.float32, torch.bfloat16)
    True
    """
    kind = torch.device(device).type
    return _measured(kind) if kind == "cpu" else torch.bfloat16
