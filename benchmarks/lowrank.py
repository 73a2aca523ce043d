"""Interpolative and CUR decompositions of 2000 x 1500 matrices, beside SciPy's and scikit-matter's.

Parts: ``float64``, ``float32`` (interpolative, rank 20 and 100, against ``scipy.linalg.interpolative``, which takes
float64 only), ``cur`` (against two SciPy decompositions and, at rank 20, scikit-matter's best setting), ``quality``
(errors over the optimum on four spectra, no clock) and ``memory-map`` (a row-major float32 file of 100 000 x 20 000 at
rank 50 with the peak of resident memory; a smaller one where the disk has less than 12 GB or with ``--quick``).
"""

import importlib.util
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import interpolative as scipy_interpolative
from torch import Tensor

from benchmarks import harness
from danlu.linalg.lowrank import cur, interpolative

PARTS = ("float64", "float32", "cur", "quality", "memory-map")
M, N = 2000, 1500


def matrices() -> Iterator[tuple[str, Tensor]]:
    """Four spectra: power law, exponential, a Gaussian kernel with noise, log-normal column sizes."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    U, V = torch.linalg.qr(gaussian(M, N))[0], torch.linalg.qr(gaussian(N, N))[0]
    j = torch.arange(1, N + 1, dtype=torch.float64)
    yield "1/j", (U / j) @ V.mT
    yield "exp(-j/15)", (U * torch.exp(-j / 15)) @ V.mT
    kernel = torch.exp(-2 * torch.cdist(gaussian(M, 3), gaussian(N, 3)).square() / 9)
    yield "kernel", kernel + 1e-4 * gaussian(M, N)
    yield "log-normal", (U * j**-0.3) @ (V.mT * torch.exp(gaussian(N)))


def scipy_columns(A: np.ndarray, rank: int) -> tuple[Tensor, np.ndarray]:
    """SciPy's decomposition at its default: the columns it takes and its coefficients."""
    index, coefficients = scipy_interpolative.interp_decomp(A, rank)
    return torch.from_numpy(index[:rank].astype(np.int64)), coefficients


def two_scipy(A: np.ndarray, rank: int) -> tuple[Tensor, Tensor]:
    """CUR by SciPy: columns from one decomposition, rows from one of the transpose (the core not even formed)."""
    return scipy_columns(A, rank)[0], scipy_columns(np.ascontiguousarray(A.T), rank)[0]


def skmatter_columns_and_rows(A: np.ndarray, rank: int) -> tuple[Tensor, Tensor]:
    """CUR by scikit-matter with scores computed anew after each pick, its most accurate setting."""
    from skmatter import feature_selection, sample_selection

    columns = feature_selection.CUR(n_to_select=rank, recompute_every=1).fit(A).selected_idx_
    rows = sample_selection.CUR(n_to_select=rank, recompute_every=1).fit(A).selected_idx_
    return torch.from_numpy(np.asarray(columns)), torch.from_numpy(np.asarray(rows))


def interpolative_speed(dtype: torch.dtype, options: harness.Options) -> list[harness.Comparison]:
    """Both ranks on the exponential spectrum; SciPy gets float64 whatever danlu gets."""
    A = dict(matrices())["exp(-j/15)"]
    B, X = A.to(dtype), A.numpy()
    tables = []
    for rank in (20, 100):
        runs: dict[str, Callable[[], object]] = {
            "scipy": lambda r=rank: scipy_interpolative.interp_decomp(X, r),
            "scipy rand=False": lambda r=rank: scipy_interpolative.interp_decomp(X, r, rand=False),
            "danlu": lambda r=rank: interpolative(B, r),
            "danlu power=1": lambda r=rank: interpolative(B, r, power=1),
            "danlu cpqr": lambda r=rank: interpolative(B, r, method="cpqr"),
        }
        title = f"interpolative {M} x {N}, rank {rank}, {str(dtype).removeprefix('torch.')}"
        tables.append(harness.compare(title, runs, base="scipy", options=options))
    return tables


def cur_speed(options: harness.Options) -> list[harness.Comparison]:
    """CUR against two SciPy decompositions, and scikit-matter where a call is short enough to repeat."""
    A = dict(matrices())["exp(-j/15)"]
    X = A.numpy()
    tables = []
    for rank in (20, 100):
        runs: dict[str, Callable[[], object]] = {
            "two scipy": lambda r=rank: two_scipy(X, r),
            "danlu": lambda r=rank: cur(A, r),
        }
        if rank == 20 and importlib.util.find_spec("skmatter") is not None:
            runs["skmatter"] = lambda r=rank: skmatter_columns_and_rows(X, r)
        tables.append(harness.compare(f"CUR {M} x {N}, rank {rank}, float64", runs, base="two scipy", options=options))
    return tables


def quality() -> None:
    """Median errors of nine generators over SciPy's error and over the optimum, all eight cases."""
    print(f"{'':12s} rank  optimum=1: scipy   danlu (worst)   two scipy  danlu CUR (worst)   f32   rand identical")
    over_scipy = []
    for name, A in matrices():
        values = torch.linalg.svdvals(A)
        for rank in (20, 100):
            best = float(values[rank:].norm())
            X = A.numpy()

            def error(approximation: Tensor, A: Tensor = A, best: float = best) -> float:
                return float((A - approximation.double()).norm()) / best

            columns, rows = two_scipy(X, rank)
            peer = error(interpolative(A, columns=columns).reconstruct())
            peer_cur = error(cur(A, columns=columns, rows=rows).reconstruct())
            same = [
                np.array_equal(*(scipy_interpolative.interp_decomp(X, rank, rand=r, rng=1)[k] for r in (True, False)))
                for k in (0, 1)
            ]

            def seeds() -> Iterator[torch.Generator]:
                yield from (torch.Generator().manual_seed(s) for s in range(5))

            ours = [error(interpolative(A, rank, generator=g).reconstruct()) for g in seeds()]
            both = [error(cur(A, rank, generator=g).reconstruct()) for g in seeds()]
            single = statistics.median(
                error(interpolative(A.float(), rank, generator=g).reconstruct()) for g in seeds()
            )
            over_scipy.append((statistics.median(ours) / peer, statistics.median(both) / peer_cur, max(both)))
            print(
                f"{name:12s} {rank:4d} {peer:18.3f} {statistics.median(ours):8.3f} ({max(ours):.3f}) {peer_cur:12.3f} "
                f"{statistics.median(both):10.3f} ({max(both):.3f}) {single:9.3f}   {all(same)}",
                flush=True,
            )
    one, two, worst = zip(*over_scipy, strict=True)
    print(f"interpolative over scipy: median {statistics.median(one):.3f}, worst {max(one):.3f}")
    print(f"CUR over two scipy: median {statistics.median(two):.3f}, worst {max(two):.3f}; optimum {max(worst):.2f}")


def memory_map(folder: Path, shape: tuple[int, int], rank: int) -> None:
    """Write a noisy matrix of that rank block by block, decompose it from the file, report seconds and peak memory."""
    m, n = shape
    path = folder / "matrix.f32"
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(rank, n, generator=generator)
    tile = 1e-2 * torch.randn(1000, n, generator=generator)
    with path.open("wb") as file:
        for low in range(0, m, 1000):
            # The noise of one tile, rolled: independent enough to have full rank, and quick to write.
            left = torch.randn(min(1000, m - low), rank, generator=generator)
            block = left @ right + tile[: left.shape[0]].roll(low // 1000 * 7 + 1, 1)
            file.write(block.numpy().tobytes())
    A = np.memmap(path, dtype=np.float32, mode="r", shape=shape)
    started = time.perf_counter()
    f = interpolative(A, rank, generator=generator)
    middle = time.perf_counter()
    g = cur(A, rank, generator=generator)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    floor = 1e-2 * ((m - rank) * (n - rank)) ** 0.5
    print(
        f"{m} x {n} float32 file ({4 * m * n / 2**30:.2f} GiB), rank {rank}: interpolative {middle - started:.0f} s, "
        f"CUR {ended - middle:.0f} s, peak resident {peak:.2f} GiB (file pages included); "
        f"error over the noise {float(f.error) / floor:.2f}, {float(g.error) / floor:.2f}"
    )


def main() -> None:
    """Measure the parts asked for."""
    options = harness.options(__doc__, parts=PARTS, rounds=5, warmup=1)
    # First, since the peak of resident memory is that of the whole process.
    if "memory-map" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            small = options.quick or shutil.disk_usage(folder).free < 12e9
            memory_map(Path(folder), (20_000, 4_000) if small else (100_000, 20_000), 50)
    tables: list[harness.Comparison | harness.Sweep] = []
    if "float64" in options.parts:
        tables += interpolative_speed(torch.float64, options)
    if "float32" in options.parts:
        tables += interpolative_speed(torch.float32, options)
    if "cur" in options.parts:
        tables += cur_speed(options)
    if "quality" in options.parts:
        quality()
    if tables:
        harness.write("lowrank", __doc__, tables, options)


if __name__ == "__main__":
    main()
