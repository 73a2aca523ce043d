import tracemalloc

import numpy as np
import pytest
import torch

from danlu.linalg.lowrank import ImplicitMatrix, cur, interpolative, nystrom, svd
from danlu.linalg.lowrank import matrix as matrix_module

D = torch.float64


def views(M):
    """The same matrix in every form that the methods take."""
    m, n = M.shape
    return {
        "products": ImplicitMatrix.from_products(lambda X: M @ X, lambda X: M.mT @ X, (m, n), dtype=M.dtype),
        "entries": ImplicitMatrix.from_entries(lambda i, j: M[i][:, j], (m, n), dtype=M.dtype),
        "array": ImplicitMatrix.from_array(M.numpy()),
        "fortran": ImplicitMatrix.from_array(np.asfortranarray(M.numpy())),
        "byteswapped": ImplicitMatrix.from_array(M.numpy().astype(M.numpy().dtype.newbyteorder("S"))),
        "strided": ImplicitMatrix.from_array(np.repeat(np.repeat(M.numpy(), 2, 0), 3, 1)[::2, ::3]),
        "transposed": ImplicitMatrix.from_array(np.ascontiguousarray(M.mT.numpy())).mT,
    }


@pytest.mark.parametrize("form", ["products", "entries", "array", "fortran", "byteswapped", "strided", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_form_acts_like_the_matrix(form, dtype, generator, monkeypatch):
    monkeypatch.setattr(matrix_module, "BLOCK_BYTES", 100)  # several blocks, the last one shorter
    M = torch.randn(23, 7, dtype=dtype, generator=generator)
    A = views(M)[form]
    X, Y = torch.randn(7, 3, dtype=dtype, generator=generator), torch.randn(23, 2, dtype=dtype, generator=generator)
    i, j = torch.tensor([4, 0, 22]), torch.tensor([6, 1])
    assert A.shape == (23, 7)
    assert torch.allclose(A.matmul(X), M @ X, atol=1e-5)
    assert torch.allclose(A.rmatmul(Y), M.mT @ Y, atol=1e-5)
    assert torch.equal(A.rows(i), M[i])
    assert torch.equal(A.columns(j), M[:, j])
    assert torch.equal(A.mT.columns(i), M[i].mT)
    assert torch.equal(A.mT.mT.rows(i), M[i])


@pytest.mark.parametrize("form", ["products", "entries", "array"])
def test_decompositions_of_an_implicit_matrix_equal_those_of_the_tensor(form, make):
    M = make(59, 47, 0.6 ** torch.arange(47.0))
    A = views(M)[form]

    def same(function, **options):
        one = function(M, 5, generator=torch.Generator().manual_seed(1), **options)
        other = function(A, 5, generator=torch.Generator().manual_seed(1), **options)
        assert torch.allclose(one.reconstruct(), other.reconstruct(), atol=1e-10)
        assert torch.allclose(one.error, other.error, atol=1e-10)

    same(svd, method="randomized")
    for method in ("sketch", "sample", "uniform"):
        same(interpolative, method=method)
        same(cur, method=method)
    same(cur, core="intersection")


def test_a_memory_map_is_decomposed_in_a_small_part_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix_module, "BLOCK_BYTES", 1 << 20)
    m, n, r = 12_000, 1_000, 10
    file = np.memmap(tmp_path / "matrix.bin", dtype=np.float32, mode="w+", shape=(m, n))
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((m, r), np.float32), rng.standard_normal((r, n), np.float32)
    for low in range(0, m, 1000):
        noise = rng.standard_normal((1000, n), np.float32)
        file[low : low + 1000] = left[low : low + 1000] @ right + np.float32(1e-2) * noise
    file.flush()
    del file
    M = np.memmap(tmp_path / "matrix.bin", dtype=np.float32, mode="r", shape=(m, n))
    before = anonymous_and_mapped()
    peak = 0

    def watch():
        nonlocal peak
        peak = max(peak, anonymous_and_mapped() - before)

    A = ImplicitMatrix.from_array(M)
    watched = ImplicitMatrix(
        A.shape,
        A.dtype,
        matmul=lambda X: (A.matmul(X), watch())[0],
        rmatmul=lambda X: (A.rmatmul(X), watch())[0],
        columns=lambda index: (A.columns(index), watch())[0],
        rows=lambda index: (A.rows(index), watch())[0],
    )
    tracemalloc.start()
    f = interpolative(watched, r, generator=torch.Generator().manual_seed(0))
    g = cur(watched, r, generator=torch.Generator().manual_seed(0))
    watch()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = 4 * m * n
    assert peak < size / 3
    assert numpy_peak < size / 8
    noise = 1e-2 * ((m - r) * (n - r)) ** 0.5
    assert noise < float(f.error) < 3 * noise
    assert noise < float(g.error) < 5 * noise


def anonymous_and_mapped():
    """Resident bytes of this process, file mappings included."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_private_memory_map_keeps_its_changes(tmp_path):
    np.zeros((5, 3), np.float64).tofile(tmp_path / "zero.bin")
    M = np.memmap(tmp_path / "zero.bin", dtype=np.float64, mode="c", shape=(5, 3))
    M[:] = np.arange(15.0).reshape(5, 3)
    f = interpolative(M, 2)
    assert np.array_equal(M, np.arange(15.0).reshape(5, 3))
    assert torch.allclose(f.reconstruct(), torch.from_numpy(np.array(M)), atol=1e-10)


def test_a_kernel_of_a_hundred_thousand_points_is_never_formed():
    x = torch.linspace(-1, 1, 100_000, dtype=D)
    asked = 0

    def kernel(i, j):
        nonlocal asked
        asked += i.numel() * j.numel()
        return torch.exp(-((x[i, None] - x[j]) ** 2))

    K = ImplicitMatrix.from_entries(kernel, (100_000, 100_000), dtype=D)
    f = nystrom(K, 12, method="cholesky", diagonal=torch.ones(100_000, dtype=D))
    assert asked == 12 * 100_000
    assert float(f.error) / 1e5 < 1e-8
    sample = torch.arange(0, 100_000, 997)
    assert torch.allclose(f.factor[sample] @ f.factor[sample].mT, kernel(sample, sample), atol=1e-6)


def test_bad_implicit_matrices_are_named(tmp_path):
    with pytest.raises(TypeError, match="array must hold float32 or float64, got int64"):
        interpolative(np.ones((3, 3), dtype=np.int64), 1)
    with pytest.raises(ValueError, match="array must be a non-empty matrix"):
        interpolative(np.ones(3), 1)
    with pytest.raises(TypeError, match="M must be a tensor, got list"):
        interpolative([[1.0]], 1)
    with pytest.raises(TypeError, match=r"dtype must be torch.float32 or torch.float64"):
        ImplicitMatrix.from_entries(lambda i, j: i, (3, 3), dtype=torch.int64)
    with pytest.raises(ValueError, match="shape must be an integer of at least 1, got 0"):
        ImplicitMatrix.from_entries(lambda i, j: i, (3, 0), dtype=D)
    with pytest.raises(ValueError, match="M must be finite"):
        interpolative(np.full((3, 3), np.nan), 1)
    for method in ("cpqr", "greedy", "norm", "norm_random", "kmeans"):
        with pytest.raises(ValueError, match="for an array or implicit matrix"):
            interpolative(np.ones((3, 3)), 1, method=method)
