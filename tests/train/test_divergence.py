import pytest
import torch
from torch import nn

from danlu.train.divergence import check_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_weight_that_is_not_finite_is_found_and_named(value: float, dtype: torch.dtype) -> None:
    weights = {name: nn.Parameter(torch.randn(5, 7, dtype=dtype)) for name in ("first", "second", "third")}
    check_finite(weights.items(), 3)
    weights["second"].data[4, 2] = value
    with pytest.raises(FloatingPointError, match="after step 3 second is not finite"):
        check_finite(weights.items(), 3)
    weights["third"].data[0, 0], weights["third"].data[0, 1] = float("inf"), -float("inf")
    with pytest.raises(FloatingPointError, match="after step 3 second and 1 more weights are not finite"):
        check_finite(weights.items(), 3)


def test_large_weights_whose_sum_overflows_are_finite() -> None:
    check_finite([("large", nn.Parameter(torch.full((3,), 3e38)))], 1)
    check_finite([("empty", nn.Parameter(torch.empty(0)))], 1)
    check_finite([], 1)
