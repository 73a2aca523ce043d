"""Muon: the size of its step, what the step does not depend on, and how far it is from the exact polar factor."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu.approx import optimal_composition
from danlu.claims.frame import Claim, absolute, at_most, exact, relative
from danlu.optim import Muon
from danlu.optim.muon_step import ADAMW_RMS

_Make = Callable[[Iterable[nn.Parameter]], Optimizer]
_EXACT = optimal_composition(1e-3, 9)


def _gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _polar(matrix: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    polar: Tensor = U @ Vh
    return polar


def _moved(gradients: Sequence[Tensor], make: _Make) -> Tensor:
    """Where one weight, started at zero, is after a step along each gradient."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = make([weight])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def _muon(**options: object) -> _Make:
    return lambda params: Muon(params, **{"lr": 1.0, "weight_decay": 0.0, **options})  # type: ignore[arg-type]


def _torch(params: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Muon(params, lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def _difference(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of the difference, relative to the first."""
    return float(torch.linalg.norm(a - b) / torch.linalg.norm(a))


def _rms_of_update(scale: str) -> float:
    return float(_moved([_gaussian(89, 127)], _muon(method=_EXACT, scale=scale)).square().mean().sqrt())


@functools.cache
def _shares(rows: int, columns: int) -> Tensor:
    """Singular values of a Gaussian matrix over its Frobenius norm."""
    matrix = _gaussian(rows, columns)
    squares = torch.linalg.eigvalsh(matrix.mT @ matrix).clamp(min=0)
    shares: Tensor = (squares / squares.sum()).sqrt()
    return shares


def _jordan_rms(steps: int) -> float:
    """RMS of Moonlight's scaled update of a 1024 x 1024 matrix, Jordan's polynomial from the Frobenius norm."""
    x = _shares(1024, 1024)
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return ADAMW_RMS * math.sqrt(1024) * float(x.square().sum().sqrt()) / 1024


def _mean_square_error(coefficients: tuple[float, float, float]) -> float:
    """Mean of (s - 1)^2 over the singular values of a 2048 x 1024 Gaussian matrix after five equal steps."""
    x = _shares(2048, 1024)
    a, b, c = coefficients
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    return float((x - 1).square().mean())


def _adam_rms(beta1: float, beta2: float) -> float:
    """RMS of Adam's update on pure noise, mean over the last half of 1000 steps."""
    generator = torch.Generator().manual_seed(0)
    m, v, total = torch.zeros(2000), torch.zeros(2000), 0.0
    for step in range(1000):
        g = torch.randn(2000, generator=generator)
        m.lerp_(g, 1 - beta1)
        v.lerp_(g.square(), 1 - beta2)
        if step >= 500:
            total += float((m / v.sqrt()).square().mean().sqrt())
    return total / 500


def _change_by_loss_scale(make: _Make) -> float:
    """Largest relative change of the update when the loss is multiplied by 1e-20 or 1e20."""
    gradient = _gaussian(23, 37).float()
    plain = _moved([gradient], make)
    return max(_difference(plain, _moved([gradient * scale], make)) for scale in (1e-20, 1e20))


def _change_by_averaging(*, nesterov: bool) -> float:
    """Relative difference between summed momentum, Nesterov's, and averaged momentum."""
    gradients = [_gaussian(13, 7, seed=seed) for seed in range(4)]
    averaged = _moved(gradients, _muon(nesterov=nesterov))
    return _difference(_moved(gradients, _muon(ema=False)), averaged)


def _stack_difference(*, flatten: bool) -> float:
    """Relative difference between a stack's step and the steps of its matrices apart."""
    stack = _gaussian(5, 7, 11)
    apart = torch.stack([_moved([matrix], _muon(steps=8)) for matrix in stack])
    together = stack.flatten(0, 1) if flatten else stack
    return _difference(apart, _moved([together], _muon(steps=8)).reshape(stack.shape))


def _head_difference(*, declare: bool) -> float:
    """Relative difference between the step of a matrix of three heads and the steps of the heads apart."""
    gradient = _gaussian(12, 17)
    weight = nn.Parameter(torch.zeros_like(gradient))
    if declare:
        weight.danlu_split = 3  # type: ignore[attr-defined]
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0)
    weight.grad = gradient.clone()
    optimizer.step()
    apart = torch.cat([_moved([head.contiguous()], _muon()) for head in torch.split(gradient, 4)])
    return _difference(apart, weight.detach())


def _spectral_norm_after(weight_decay: float) -> float:
    """Spectral norm after 80 steps along the same few gradients."""
    gradients = [_gaussian(9, 17, seed=seed % 3) for seed in range(80)]
    weight = _moved(gradients, _muon(lr=0.5, weight_decay=weight_decay, scale="plain"))
    return float(torch.linalg.matrix_norm(weight, 2))


def _spectra(m: int, n: int) -> list[Tensor]:
    """Gaussian, log-uniform on [1e-3, 1], a sixteenth large, and power-law spectra."""
    gaussian = _gaussian(m, n)
    U, _, Vh = torch.linalg.svd(gaussian, full_matrices=False)
    uniform = torch.rand(m, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    few = torch.where(torch.arange(m) < m // 16, 1.0, 1e-2).double()
    values = [10 ** (-3 * uniform), few, 1 / torch.arange(1, m + 1).double()]
    return [gaussian, *(U @ torch.diag(value) @ Vh for value in values)]


def _worst_error_ratio(steps: int) -> float:
    """Error of Muon's first update over that of torch.optim.Muon, the worst of four spectra."""
    ratios = []
    for gradient in _spectra(96, 384):
        exact = -_polar(gradient) * ADAMW_RMS * math.sqrt(384)
        ours = _moved([gradient.float()], _muon(steps=steps, dtype=torch.float32)).double()
        theirs = _moved([gradient.float()], _torch).double()
        ratios.append(_difference(exact, ours) / _difference(exact, theirs))
    return max(ratios)


def _momentum_error(make: Callable[[list[nn.Parameter]], Optimizer]) -> float:
    """Relative error of a bfloat16 momentum's norm after three equal gradients, without Nesterov's look ahead."""
    gradient = (100 * _gaussian(7, 13)).bfloat16()
    weight = nn.Parameter(torch.zeros_like(gradient))
    optimizer = make([weight])
    for _ in range(3):
        weight.grad = gradient.clone()
        optimizer.step()
    held: Tensor = optimizer.state[weight]["momentum_buffer"]
    expected = float(gradient.float().norm()) * (1 - 0.95**3)
    return abs(float(held.float().norm()) / expected - 1)


def _value_after_decay(decay: str) -> float:
    """Smallest singular value of a weight with 3, 1 and 0.1 after 20 steps along no gradient."""
    weight = nn.Parameter(torch.diag(torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64)))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5, decay=decay)
    for _ in range(20):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    return float(torch.linalg.svdvals(weight.detach())[-1])


def _collectives(make: _Make) -> float:
    """Collectives in a step over one bucket of six matrices, each cut over four processes.

    Counted on the first of them, with a backend that carries nothing: the count does not depend on values.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,))
        params = [nn.Parameter(distribute_tensor(torch.ones(8, 12), mesh, [Shard(0)])) for _ in range(6)]
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer = make(params)
        with CommDebugMode() as counted:
            optimizer.step()
        return float(counted.get_total_counts())
    finally:
        dist.destroy_process_group()


def _state_bytes(make: _Make) -> float:
    """Bytes of an optimizer's state over the bytes of its one float32 matrix."""
    weight = nn.Parameter(torch.zeros(31, 17))
    weight.grad = torch.ones_like(weight)
    optimizer = make([weight])
    optimizer.step()
    held: int = sum(value.nbytes for value in optimizer.state[weight].values())
    return held / weight.nbytes


CLAIMS = (
    Claim(
        name="rms-of-adamw",
        statement="RMS of the update of an exact polar factor, scale moonlight, 89 x 127; control: Jordan's scale",
        source="Liu et al., arXiv 2502.16982, section 2.2, lemma 1 and equation 4",
        expected=0.2,
        tolerance=absolute(1e-6),
        measure=lambda: _rms_of_update("moonlight"),
        control=lambda: _rms_of_update("jordan"),
        seconds=0.2,
    ),
    Claim(
        name="adam-noise-rms",
        statement="RMS of Adam's update on pure noise, betas 0.9 and 0.95; control: no first moment",
        source="kexue.fm 11267: sqrt((1 - b1) / (1 + b1)) = 0.2294",
        expected=math.sqrt(0.1 / 1.9),
        tolerance=absolute(0.01),
        measure=lambda: _adam_rms(0.9, 0.95),
        control=lambda: _adam_rms(0.0, 0.95),
        seconds=0.3,
    ),
    Claim(
        name="jordan-rms-falls-short",
        statement="RMS of the update with Jordan's five steps, Gaussian 1024 x 1024 (not 0.20); control: four steps",
        source="derivation: Jordan's polynomial on the singular values over the Frobenius norm (0.1821)",
        expected=0.1821,
        tolerance=absolute(0.001),
        measure=lambda: _jordan_rms(5),
        control=lambda: _jordan_rms(4),
        seconds=1.0,
    ),
    Claim(
        name="jordan-mean-square-error",
        statement="mean (s - 1)^2 after Jordan's five steps, Gaussian 2048 x 1024; control: coefficients fitted to it",
        source="kexue.fm 10592, table (0.02954)",
        expected=0.02954,
        tolerance=relative(0.01),
        measure=lambda: _mean_square_error((3.4445, -4.7750, 2.0315)),
        control=lambda: _mean_square_error((2.644, -3.128, 1.476)),
        seconds=2.0,
    ),
    Claim(
        name="loss-scale",
        statement="change of the update when the loss is scaled by 1e-20 or 1e20; control: torch.optim.Muon",
        source="kexue.fm 10592: msign(c M) = msign(M)",
        expected=1e-5,
        tolerance=at_most(),
        measure=lambda: _change_by_loss_scale(_muon(dtype=torch.float32)),
        control=lambda: _change_by_loss_scale(_torch),
        seconds=0.2,
    ),
    Claim(
        name="summed-is-averaged-momentum",
        statement="difference between steps with summed and averaged momentum; control: no look ahead in one of them",
        source="kexue.fm 10592: msign forgets the factor 1 - mu",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _change_by_averaging(nesterov=True),
        control=lambda: _change_by_averaging(nesterov=False),
        seconds=0.1,
    ),
    Claim(
        name="stack-is-its-experts",
        statement="difference between the step of 5 stacked experts and of each apart; control: one tall matrix",
        source="derivation: an expert is a linear map of its own",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _stack_difference(flatten=False),
        control=lambda: _stack_difference(flatten=True),
        seconds=0.1,
    ),
    Claim(
        name="heads-apart",
        statement="difference between a matrix declared to be 3 heads and the heads apart; control: not declared",
        source="derivation: per-head orthogonalisation is the step of separate parameters",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _head_difference(declare=True),
        control=lambda: _head_difference(declare=False),
        seconds=0.1,
    ),
    Claim(
        name="decay-bounds-the-norm",
        statement="spectral norm of a weight after 80 steps, decay 0.1, plain scale; control: no decay",
        source="kexue.fm 10739: max(|W0|, |update| / decay), the update's norm being at most 1.01",
        expected=1.01 / 0.1,
        tolerance=at_most(),
        measure=lambda: _spectral_norm_after(0.1),
        control=lambda: _spectral_norm_after(0.0),
        seconds=0.5,
    ),
    Claim(
        name="spectral-decay-lowers-the-top-only",
        statement="smallest singular value, 0.1 at first, after 20 steps of decay 0.05; control: decoupled decay",
        source="kexue.fm 10648: the gradient of half the squared spectral norm touches the largest value only",
        expected=0.1,
        tolerance=relative(1e-3),
        measure=lambda: _value_after_decay("spectral"),
        control=lambda: _value_after_decay("decoupled"),
        seconds=0.1,
    ),
    Claim(
        name="error-below-five-jordan-steps",
        statement="error of the update over torch.optim.Muon's, worst of four spectra, 96 x 384; control: three steps",
        source="design: five steps for [2e-3, 1] from the Schatten-8 bound",
        expected=1.0,
        tolerance=at_most(),
        measure=lambda: _worst_error_ratio(5),
        control=lambda: _worst_error_ratio(3),
        seconds=0.5,
    ),
    Claim(
        name="momentum-is-not-overwritten",
        statement="error of a bfloat16 momentum's norm after 3 gradients, no Nesterov; control: torch.optim.Muon",
        source="derivation: 1 - 0.95^3 of the gradient's norm",
        expected=0.01,
        tolerance=at_most(),
        measure=lambda: _momentum_error(lambda params: Muon(params, nesterov=False, dtype=torch.bfloat16)),
        control=lambda: _momentum_error(lambda params: torch.optim.Muon(params, nesterov=False)),
        seconds=0.1,
    ),
    Claim(
        name="three-collectives-a-bucket",
        statement="collectives in a step over six equal matrices cut over 4 processes; control: torch.optim.Muon",
        source="design: one all-to-all there, one back, and one that compares which gradients there are",
        expected=3,
        tolerance=exact(),
        measure=lambda: _collectives(_muon(dtype=torch.float32)),
        control=lambda: _collectives(_torch),
        seconds=1.5,
    ),
    Claim(
        name="bfloat16-momentum",
        statement="bytes of Muon's state, momentum in bfloat16, over those of a float32 matrix; control: in float32",
        source="derivation: one momentum of 2 bytes a parameter, a quarter of AdamW's state",
        expected=0.5,
        tolerance=exact(),
        measure=lambda: _state_bytes(_muon(momentum_dtype=torch.bfloat16)),
        control=lambda: _state_bytes(_muon()),
        seconds=0.1,
    ),
)
