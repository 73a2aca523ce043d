"""Inputs of low-rank methods: a tensor, an array (also memory-mapped), or a matrix given by callables."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danlu._autograd import ordinary
from danlu._validate import integer
from danlu.linalg._matrix import holds

BLOCK_BYTES = 64 << 20
_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class ImplicitMatrix:
    """An m x n matrix that need not exist in memory: four callables that act on tensors.

    Build one with :meth:`from_products`, :meth:`from_entries` or :meth:`from_array`; every low-rank method that can
    work without the full matrix accepts it in the place of a tensor.

    Attributes:
        shape: (m, n).
        dtype: float32 or float64, that of everything the callables return.
        matmul: X (n, k) -> M X (m, k).
        rmatmul: X (m, k) -> Mᵀ X (n, k).
        columns: indices (k,) -> M[:, indices] (m, k).
        rows: indices (k,) -> M[indices] (k, n).
        device: where the callables expect and return their tensors.

    >>> import torch
    >>> x = torch.linspace(0, 1, 5, dtype=torch.float64)
    >>> K = ImplicitMatrix.from_entries(lambda i, j: 1 / (1 + (x[i, None] - x[j]).abs()), (5, 5), dtype=torch.float64)
    >>> K.rows(torch.tensor([0])).shape, (K.matmul(torch.ones(5, 1, dtype=torch.float64))).shape
    (torch.Size([1, 5]), torch.Size([5, 1]))
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    matmul: Callable[[Tensor], Tensor]
    rmatmul: Callable[[Tensor], Tensor]
    columns: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor], Tensor]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if len(self.shape) != 2:
            raise ValueError(f"shape must be (m, n), got {self.shape!r}")
        for side in self.shape:
            integer("shape", side)
        if self.dtype not in _DTYPES:
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {self.dtype}")

    @property
    def mT(self) -> "ImplicitMatrix":
        """The transpose, from the same callables."""
        return ImplicitMatrix(
            (self.shape[1], self.shape[0]),
            self.dtype,
            matmul=self.rmatmul,
            rmatmul=self.matmul,
            columns=lambda index: self.rows(index).mT,
            rows=lambda index: self.columns(index).mT,
            device=self.device,
        )

    @classmethod
    def from_products(
        cls,
        matmul: Callable[[Tensor], Tensor],
        rmatmul: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> "ImplicitMatrix":
        """Make a matrix from its products with blocks of vectors; its columns are products with unit vectors."""
        place = torch.device(device)

        def unit(index: Tensor, size: int) -> Tensor:
            block = torch.zeros(size, index.numel(), dtype=dtype, device=place)
            block[index, torch.arange(index.numel(), device=place)] = 1
            return block

        return cls(
            shape,
            dtype,
            matmul,
            rmatmul,
            columns=lambda index: matmul(unit(index, shape[1])),
            rows=lambda index: rmatmul(unit(index, shape[0])).mT,
            device=place,
        )

    @classmethod
    def from_entries(
        cls,
        entries: Callable[[Tensor, Tensor], Tensor],
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> "ImplicitMatrix":
        """Make a matrix from its entries: ``entries(i, j)`` returns the block M[i][:, j] for index vectors i and j.

        Products iterate over blocks of rows of about 64 MiB, so only one such block exists at a time.
        """
        place = torch.device(device)
        rows, columns = (torch.arange(side, device=place) for side in shape)

        def block(low: int, high: int) -> Tensor:
            return entries(rows[low:high], columns)

        return cls._from_blocks(
            block,
            shape,
            dtype,
            place,
            pick_columns=lambda index: entries(rows, index),
            pick_rows=lambda index: entries(index, columns),
        )

    @classmethod
    def from_array(cls, array: np.ndarray) -> "ImplicitMatrix":
        """Make a matrix from a NumPy array, read in blocks of rows of about 64 MiB: it may be larger than memory.

        The pages of a memory map are released after each block, so only one block is resident. Row-major files are
        fastest, because their blocks are contiguous.
        """
        if not isinstance(array, np.ndarray):
            raise TypeError(f"array must be a numpy array, got {type(array).__name__}")
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"array must be a non-empty matrix, got shape {array.shape}")
        if array.dtype.newbyteorder("=") not in (np.float32, np.float64):
            raise TypeError(f"array must hold float32 or float64, got {array.dtype}")
        native = array.dtype.newbyteorder("=")
        dtype = torch.float32 if native == np.float32 else torch.float64
        shape = (array.shape[0], array.shape[1])

        def block(low: int, high: int) -> Tensor:
            return torch.from_numpy(np.array(array[low:high], dtype=native, order="C"))

        def gather(index: Tensor) -> Tensor:
            chosen = index.cpu().numpy()
            out = torch.empty(shape[0], index.numel(), dtype=dtype)
            for low, high in _row_blocks(shape, dtype):
                out[low:high] = torch.from_numpy(np.ascontiguousarray(array[low:high, chosen], dtype=native))
                _release(array)
            return out

        def pick(index: Tensor) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array[index.cpu().numpy()], dtype=native))

        return cls._from_blocks(
            block, shape, dtype, torch.device("cpu"), gather, pick, after_block=lambda: _release(array)
        )

    @classmethod
    def _from_blocks(
        cls,
        block: Callable[[int, int], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        pick_columns: Callable[[Tensor], Tensor],
        pick_rows: Callable[[Tensor], Tensor],
        after_block: Callable[[], None] = lambda: None,
    ) -> "ImplicitMatrix":
        def matmul(X: Tensor) -> Tensor:
            out = torch.empty(shape[0], X.shape[-1], dtype=dtype, device=device)
            for low, high in _row_blocks(shape, dtype):
                torch.matmul(block(low, high), X, out=out[low:high])
                after_block()
            return out

        def rmatmul(X: Tensor) -> Tensor:
            out = torch.zeros(shape[1], X.shape[-1], dtype=dtype, device=device)
            for low, high in _row_blocks(shape, dtype):
                out.addmm_(block(low, high).mT, X[low:high])
                after_block()
            return out

        return cls(shape, dtype, matmul, rmatmul, pick_columns, pick_rows, device)


Matrix = Tensor | ImplicitMatrix
MatrixLike = Tensor | np.ndarray | ImplicitMatrix


def _row_blocks(shape: tuple[int, int], dtype: torch.dtype) -> list[tuple[int, int]]:
    height = max(1, BLOCK_BYTES // (shape[1] * dtype.itemsize))
    return [(low, min(low + height, shape[0])) for low in range(0, shape[0], height)]


def _release(array: np.ndarray) -> None:
    """Release the pages of a file mapping, except of a private (copy-on-write) one, which would lose its changes."""
    mapping = getattr(array, "_mmap", None)
    if isinstance(mapping, mmap.mmap) and getattr(array, "mode", None) in ("r", "r+"):
        mapping.madvise(mmap.MADV_DONTNEED)


def as_matrix(name: str, M: MatrixLike) -> Matrix:
    """Check that ``M`` is a real matrix (a tensor with any leading dimensions); turn an array into an implicit one.

    Raises:
        TypeError: not a tensor, array or implicit matrix, or a dtype other than float32 and float64.
        ValueError: fewer than two dimensions, or no entries.
    """
    if isinstance(M, ImplicitMatrix):
        return M
    if isinstance(M, np.ndarray):
        return ImplicitMatrix.from_array(M)
    return as_tensor(name, M)


def as_tensor(name: str, M: Tensor, *, ndim: int = 2) -> Tensor:
    """Check that ``M`` is a float32 or float64 tensor whose last ``ndim`` dimensions exist and are not 0."""
    if not isinstance(M, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(M).__name__}")
    if M.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32 or float64, got {M.dtype}")
    if M.ndim < ndim:
        raise ValueError(f"{name} must have at least {ndim} dimensions (…, m, n), got shape {tuple(M.shape)}")
    if 0 in M.shape[M.ndim - ndim :]:
        raise ValueError(f"{name} must not be empty, got shape {tuple(M.shape)}")
    return M


def check_finite(name: str, witness: Tensor, M: Matrix) -> None:
    """Raise if ``witness``, a small quantity computed from every entry of ``M``, is not finite.

    Checking the witness is far cheaper than a pass over the matrix, which is read only to find out what is wrong.
    """
    if not ordinary(witness) or bool(torch.isfinite(witness).all()):
        return
    if isinstance(M, Tensor) and bool(torch.isfinite(M).all()):
        raise ValueError(f"{name} overflows {M.dtype}: scale it down")
    raise ValueError(f"{name} must be finite, but it holds NaN or Inf")


def check_rank(rank: int, shape: tuple[int, ...]) -> None:
    """Raise unless ``rank`` is an integer from 1 to the smaller side."""
    integer("rank", rank, low=1, high=min(shape[-2:]))


def check_indices(name: str, index: Tensor, size: int, M: Matrix) -> Tensor:
    """Check that ``index`` (…, r) holds distinct positions below ``size``; expand it to the batch of ``M``."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be a tensor of integer indices, got {index!r}")
    if index.ndim < 1 or index.shape[-1] == 0:
        raise ValueError(f"{name} must hold at least one index, got shape {tuple(index.shape)}")
    if not holds((index >= 0) & (index < size), unknown=True):
        raise ValueError(f"{name} must lie in [0, {size - 1}], got {int(index.min())} … {int(index.max())}")
    ordered = index.sort(-1).values
    if not holds(ordered.diff(dim=-1) != 0, unknown=True):
        raise ValueError(f"{name} must not repeat an index")
    batch = () if isinstance(M, ImplicitMatrix) else M.shape[:-2]
    if index.ndim > 1 and index.shape[:-1] != batch:
        raise ValueError(
            f"{name} must have the leading dimensions {tuple(batch)} or none, got {tuple(index.shape[:-1])}"
        )
    return index.long().to(M.device).expand(*batch, index.shape[-1])


def columns_of(M: Matrix, index: Tensor) -> Tensor:
    """M[…, :, index] for index (…, r): (…, m, r)."""
    if isinstance(M, ImplicitMatrix):
        return M.columns(index)
    if M.ndim == 2:
        return M.index_select(1, index)
    return M.gather(-1, index.unsqueeze(-2).expand(*M.shape[:-1], index.shape[-1]))


def rows_of(M: Matrix, index: Tensor) -> Tensor:
    """M[…, index, :] for index (…, r): (…, r, n)."""
    if isinstance(M, ImplicitMatrix):
        return M.rows(index)
    if M.ndim == 2:
        return M.index_select(0, index)
    return M.gather(-2, index.unsqueeze(-1).expand(*index.shape, M.shape[-1]))


def times(M: Matrix, X: Tensor) -> Tensor:
    """M X."""
    return M.matmul(X)


def transposed_times(M: Matrix, X: Tensor) -> Tensor:
    """Mᵀ X."""
    return M.rmatmul(X) if isinstance(M, ImplicitMatrix) else M.mT @ X


def gaussian(M: Matrix, rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """A (…, rows, columns) matrix of N(0, 1) entries of ``M``'s dtype and device, one for each matrix of its batch."""
    batch = () if isinstance(M, ImplicitMatrix) else M.shape[:-2]
    # Drawn in float32 whatever the dtype: seven digits of a random direction suffice, in a quarter of the time.
    return draw(*batch, rows, columns, generator=generator, device=M.device).to(M.dtype)


def draw(*shape: int, generator: torch.Generator | None, **options: Any) -> Tensor:
    """``torch.randn``, which takes open sizes of an exported program without the argument ``generator`` only."""
    return torch.randn(shape, **options) if generator is None else torch.randn(shape, generator=generator, **options)


def solve_triangular(R: Tensor, B: Tensor, size: int) -> Tensor:
    """Return R⁺ B for an upper triangular R (…, r, r), the factor of a matrix whose larger side is ``size``.

    It uses back substitution where R is numerically regular, and elsewhere (or where nobody can look) the minimum-norm
    solution by a truncated SVD, so that dependent columns give finite coefficients.
    """
    diagonal = R.diagonal(dim1=-2, dim2=-1).abs()
    rtol = size * torch.finfo(R.dtype).eps
    if holds(diagonal.amin(-1) > rtol * diagonal.amax(-1), unknown=False):
        solved: Tensor = torch.linalg.solve_triangular(R, B, upper=True)
    else:
        solved = torch.linalg.pinv(R, rtol=rtol) @ B
    return solved
