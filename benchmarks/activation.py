"""SquarePlus forward and backward on 4096 x 1024 float32 beside the plain formula and softplus."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import harness
from danlu.nn import squareplus


def step(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], object]:
    """One forward and backward pass."""
    return lambda: torch.autograd.grad(function(x), x, grad)


def main() -> None:
    """Run the comparison."""
    options = harness.options(__doc__, cpu_time=True, threads=1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 1024, generator=generator).requires_grad_()
    grad = torch.randn(4096, 1024, generator=generator)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "plain formula": lambda t: (t + torch.sqrt(t * t + 4)) / 2,
        "softplus": torch.nn.functional.softplus,
        "danlu": squareplus,
    }
    runs = {name: step(function, x, grad) for name, function in functions.items()}
    harness.write(
        "activation", __doc__, [harness.compare("4096 x 1024", runs, base="plain formula", options=options)], options
    )


if __name__ == "__main__":
    main()
