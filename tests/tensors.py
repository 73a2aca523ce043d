"""Random tensors for tests."""

import torch
from torch import Tensor


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers of a seed, the same in every dtype up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def int8_products_saturate() -> bool:
    """Whether this processor's ``torch._int_mm`` keeps sums of two products in 16 bits, as those without VNNI do."""
    ones = torch.full((32, 32), 127, dtype=torch.int8)
    return bool(
        (torch._int_mm(ones, -ones) != -32 * 127 * 127).any() or (torch._int_mm(ones, ones) != 32 * 127**2).any()
    )
