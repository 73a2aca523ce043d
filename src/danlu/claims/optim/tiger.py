"""Tiger: accumulation in its one state buffer, steps relative to what they move, and a NaN that is survived."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu.claims.frame import Claim, absolute, at_most, relative
from danlu.optim import Lion, Tiger

_Make = Callable[[list[nn.Parameter]], Optimizer]


def _gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _momentum(make: _Make, gradients: Sequence[Tensor]) -> Tensor:
    weight = nn.Parameter(torch.ones_like(gradients[0]))
    optimizer = make([weight])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    held: Tensor = optimizer.state[weight]["exp_avg"]
    return held


def _accumulation_error(micro_steps: int) -> float:
    """Largest difference between the momentum after 12 micro-batches of 4 and after the 3 mean gradients."""
    gradients = [_gaussian(7, 11, seed=seed) for seed in range(12)]
    means = [torch.stack(gradients[start : start + 4]).mean(0) for start in range(0, 12, 4)]
    built_in = _momentum(lambda params: Tiger(params, accumulate=micro_steps), gradients)
    return float((built_in - _momentum(Tiger, means)).abs().max())


def _relative_step(scale: str) -> float:
    """Step of a matrix over its root mean square and the learning rate 1e-3."""
    start = 0.02 * _gaussian(37, 41, seed=0)
    weight = nn.Parameter(start.clone())
    weight.grad = _gaussian(37, 41, seed=1)
    Tiger([weight], lr=1e-3, weight_decay=0.0, scale=scale).step()
    return float((weight.detach() - start).square().mean().sqrt() / start.square().mean().sqrt()) / 1e-3


def _after_nan(make: _Make) -> float:
    """A weight of 2 after one gradient that is not a number."""
    weight = nn.Parameter(torch.full((1, 2), 2.0, dtype=torch.float64))
    weight.grad = torch.full((1, 2), torch.nan, dtype=torch.float64)
    make([weight]).step()
    return weight[0, 0].item()


def _distance_from_formula(*, whole_table: bool) -> float:
    """Largest distance of weights from Tiger in plain tensors; the control measures an embedding as one matrix."""
    worst = 0.0
    shapes = {"matrix": (5, 7), "embedding": (11, 3), "gain": (6,), "bias": (4,), "conv": (3, 2, 3, 3)}
    for accumulate, rate in ((1, 0.01), (3, torch.tensor(0.01, dtype=torch.float64))):
        weights = {role: nn.Parameter(1 + _gaussian(*shape, seed=3)) for role, shape in shapes.items()}
        groups = [{"params": [weight], "role": role} for role, weight in weights.items()]
        optimizer = Tiger(groups, lr=rate, beta=0.9, weight_decay=0.2, accumulate=accumulate)
        plain = {role: weight.detach().clone() for role, weight in weights.items()}
        momenta = {role: torch.zeros_like(weight) for role, weight in plain.items()}
        for count in range(6):
            for place, (role, weight) in enumerate(weights.items()):
                weight.grad = _gaussian(*weight.shape, seed=17 * count + place)
                if count == 4 and role == "gain":
                    weight.grad[0] = math.inf
                W, m = plain[role], momenta[role]
                if not weight.grad.isfinite().all():
                    plain[role] = 1 + 0.99 * (W - 1)
                    continue
                momenta[role] = m = (0.9 if count % accumulate == 0 else 1.0) * m + 0.1 / accumulate * weight.grad
                if (count + 1) % accumulate:
                    continue
                axes = 1 if role == "embedding" and not whole_table else tuple(range(W.ndim))
                size = W.square().mean(axes, keepdim=True).sqrt() if role not in ("gain", "bias") else 0.5
                decay = 0.2 if role not in ("gain", "bias") else 0.0
                plain[role] = W - 0.01 * size * (m.sign() + decay * W)
            optimizer.step()
        worst = max(worst, *(float((weights[role].detach() - W).abs().max()) for role, W in plain.items()))
    return worst


CLAIMS = (
    Claim(
        name="accumulation",
        statement="error of the momentum after 3 steps of 4 micro-batches each; control: every micro-batch a step",
        source="kexue.fm 9512, equation of the accumulation",
        expected=5e-17,
        tolerance=at_most(),
        measure=lambda: _accumulation_error(4),
        control=lambda: _accumulation_error(1),
        seconds=0.1,
    ),
    Claim(
        name="formula",
        statement="largest distance of five kinds of weights after six steps, accumulated or not, from plain tensors; "
        "control: an embedding's size over the table and not over each row",
        source="kexue.fm 9512: RMS(W) for matrices, by rows for embeddings, 1/2 and no decay for gains and biases",
        expected=1e-13,
        tolerance=at_most(),
        measure=lambda: _distance_from_formula(whole_table=False),
        control=lambda: _distance_from_formula(whole_table=True),
        seconds=0.1,
    ),
    Claim(
        name="relative-step",
        statement="RMS of a step over the RMS of the matrix and the rate; control: the sign alone",
        source="kexue.fm 9512: lr RMS(W)",
        expected=1.0,
        tolerance=relative(1e-9),
        measure=lambda: _relative_step("rms"),
        control=lambda: _relative_step("none"),
        seconds=0.1,
    ),
    Claim(
        name="nan-rule",
        statement="a weight of 2 after a gradient of NaN; control: Lion, which stays",
        source="kexue.fm 9512: shrink by 0.99 and keep the momentum",
        expected=1.98,
        tolerance=absolute(1e-12),
        measure=lambda: _after_nan(Tiger),
        control=lambda: _after_nan(Lion),
        seconds=0.1,
    ),
)
