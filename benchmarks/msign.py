"""The matrix sign beside torch.optim.Muon's iteration, the SVD and plain loops over published coefficients.

Parts: ``bfloat16`` (what an optimizer uses where the processor multiplies it fast) and ``float32`` (the accurate sign).
Errors are Frobenius errors over sqrt(rank) on four spectra: Gaussian, log-uniform 1e-3..1, the power law 1/i, and a
sixteenth of ones above 1e-2.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as torch_muon

from benchmarks import harness
from danlu.approx import published
from danlu.linalg import msign, orthogonalize
from danlu.linalg.msign import default_compositions

PARTS = ("bfloat16", "float32")
SHAPES = ((256, 256), (1024, 1024), (512, 2048), (1024, 4096))
STACK = (64, 128, 384)
JORDAN = (3.4445, -4.7750, 2.0315)

Sign = Callable[[Tensor], Tensor]


def plain(M: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    """The iteration as it is published: Frobenius scale, both products of a step with the large matrix, small side."""
    X = M.mT if M.shape[-2] > M.shape[-1] else M
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) * 1.01 + 1e-7)
    for a, b, c in rows:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if M.shape[-2] > M.shape[-1] else X


def each(sign: Sign) -> Sign:
    """Apply a function of one matrix to each of a stack."""
    return lambda M: torch.stack([sign(x) for x in M]) if M.ndim == 3 else sign(M)


def exact(M: Tensor) -> Tensor:
    """By the singular value decomposition."""
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def engine(M: Tensor, rows: object, dtype: torch.dtype) -> Tensor:
    """The bare engine, as the optimizer calls it."""
    return orthogonalize(M.to(dtype).reshape(-1, *M.shape[-2:]), rows).reshape(M.shape)  # type: ignore[arg-type]


def implementations(part: str) -> dict[str, Sign]:
    """Return the functions compared in a part; the first is the base."""
    five, four = default_compositions(torch.bfloat16)
    polar_express = published("polar_express", 8).coefficients
    if part == "bfloat16":
        return {
            "torch.optim.Muon": each(lambda M: torch_muon(M, JORDAN, 5, 1e-7)),
            "Polar Express, 5 steps": lambda M: plain(M.bfloat16(), polar_express[:5]),
            "danlu auto": lambda M: msign(M, method="designed", dtype=torch.bfloat16),
            "danlu 5 steps": lambda M: engine(M, five, torch.bfloat16),
            "danlu 4 steps": lambda M: engine(M, four, torch.bfloat16),
            "danlu 5 steps, float32": lambda M: engine(M, five, torch.float32),
        }
    return {
        "torch.linalg.svd": exact,
        "Jordan, 5 steps": lambda M: plain(M, (JORDAN,) * 5),
        "Polar Express, 8 steps": lambda M: plain(M, polar_express),
        "danlu": msign,
    }


def spectra(m: int, n: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return matrices with four spectra, and their exact signs."""
    generator = torch.Generator().manual_seed(0)
    r = min(m, n)
    M = torch.randn(m, n, generator=generator)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    i = torch.arange(1, r + 1)
    sigma = {
        "log-uniform": 10 ** (-3 * torch.rand(r, generator=generator)),
        "1/i": 1 / i,
        "heavy": torch.where(i <= r // 16, 1.0, 1e-2),
    }
    return {"Gaussian": (M, U @ Vh)} | {name: ((U * s) @ Vh, U @ Vh) for name, s in sigma.items()}


def errors(sign: Sign, cases: dict[str, tuple[Tensor, Tensor]]) -> str:
    """Frobenius error over sqrt(rank) for each spectrum, in one line."""
    found = {
        name: ((sign(M).float() - exact).norm() / math.sqrt(min(M.shape))).item() for name, (M, exact) in cases.items()
    }
    return ", ".join(f"{name} {error:.2g}" for name, error in found.items())


def main() -> None:
    options = harness.options(__doc__, parts=PARTS, rounds=5, warmup=1)
    tables = []
    shapes = SHAPES[::2] if options.quick else SHAPES
    for part in options.parts:
        runs = implementations(part)
        for m, n in shapes:
            cases = spectra(m, n)
            M = cases["Gaussian"][0]
            notes = {name: errors(sign, cases) for name, sign in runs.items()}
            bound = {name: (lambda sign=sign, M=M: sign(M)) for name, sign in runs.items()}
            tables.append(
                harness.compare(f"{part}, {m} x {n}", bound, base=next(iter(runs)), options=options, notes=notes)
            )
        stack = torch.randn(STACK, generator=torch.Generator().manual_seed(0))
        bound = {name: (lambda sign=sign, stack=stack: sign(stack)) for name, sign in runs.items()}
        title = f"{part}, {STACK[0]} matrices of {STACK[1]} x {STACK[2]}"
        tables.append(harness.compare(title, bound, base=next(iter(runs)), options=options))
    harness.write("msign", __doc__, tables, options)


if __name__ == "__main__":
    main()
