"""Matrices with known spectra, shared by the tests of low-rank approximation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Make = Callable[..., Tensor]


def _orthonormal(m: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(m, n, dtype=torch.float64, generator=generator))[0]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def make(generator: torch.Generator) -> Make:
    """make(m, n, singular_values) -> a random matrix (m, n) with exactly these singular values, in float64."""

    def with_spectrum(m: int, n: int, values: Tensor) -> Tensor:
        k = values.numel()
        return (_orthonormal(m, k, generator) * values.double()) @ _orthonormal(n, k, generator).mT

    return with_spectrum


@pytest.fixture
def low_rank(generator: torch.Generator) -> Make:
    """low_rank(m, n, r, batch=()) -> a generic product of (…, m, r) and (…, r, n)."""

    def product(m: int, n: int, r: int, batch: tuple[int, ...] = ()) -> Tensor:
        left = torch.randn(*batch, m, r, dtype=torch.float64, generator=generator)
        return left @ torch.randn(*batch, r, n, dtype=torch.float64, generator=generator)

    return product
