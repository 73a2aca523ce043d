"""Singular-value clipping beside an SVD and the hard cap by two matrix signs of eight steps, in float32.

Errors are operator norms over the largest singular value, for spectra 0.2..2 and 1e-3..30 (log-uniform), and for the
one whose largest is 1000 while most lie in [0, 1].
"""

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.msign import Sign, plain
from danlu.approx import published
from danlu.linalg import mclip

SHAPES = ((256, 256), (1024, 1024), (512, 2048), (1024, 4096))
ROWS = published("polar_express", 8).coefficients


def exact(M: Tensor) -> Tensor:
    """By the singular value decomposition."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return (U * S.clamp(max=1)) @ Vh


def by_signs(M: Tensor) -> Tensor:
    """The hard cap by two signs of eight Polar Express steps, in the working precision."""
    return mclip(M, method="hard_cap", sign=lambda X: plain(X, ROWS))


CONTESTANTS: dict[str, Sign] = {"torch.linalg.svd": exact, "hard cap by two signs": by_signs, "danlu auto": mclip}


def spectra(m: int, n: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return float32 matrices with three spectra, and their clips in float64."""
    generator = torch.Generator().manual_seed(0)
    r = min(m, n)
    U = torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64)).Q
    sigma = {
        "0.2..2": torch.linspace(0.2, 2, r),
        "1e-3..30": torch.logspace(-3, 1.477, r),
        "up to 1000": torch.cat([torch.linspace(0, 1, r - r // 8), torch.linspace(1, 1000, r // 8)]),
    }
    return {k: (((U * s.double()) @ V.T).float(), (U * s.double().clamp(max=1)) @ V.T) for k, s in sigma.items()}


def error(clip: Sign, M: Tensor, expected: Tensor) -> float:
    """Operator norm of the error over that of the matrix, by the Gram matrices in float64."""

    def norm(X: Tensor) -> Tensor:
        X = X if X.shape[0] <= X.shape[1] else X.T
        return torch.linalg.eigvalsh(X @ X.T)[-1].clamp_min(0).sqrt()

    return (norm(clip(M).double() - expected) / norm(M.double())).item()


def main() -> None:
    options = harness.options(__doc__, rounds=5, warmup=1)
    tables = []
    for m, n in SHAPES[::2] if options.quick else SHAPES:
        cases = spectra(m, n)
        notes = {
            name: ", ".join(f"{k} {error(clip, *case):.1g}" for k, case in cases.items())
            for name, clip in CONTESTANTS.items()
        }
        M = cases["1e-3..30"][0]
        runs = {name: (lambda clip=clip, M=M: clip(M)) for name, clip in CONTESTANTS.items()}
        tables.append(
            harness.compare(f"float32, {m} x {n}", runs, base="torch.linalg.svd", options=options, notes=notes)
        )
    harness.write("mclip", __doc__, tables, options)


if __name__ == "__main__":
    main()
