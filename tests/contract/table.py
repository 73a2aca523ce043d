"""The hand-written functions of the contract and the layers made of them, one line each.

`test_contract.py` puts each through every condition of `conditions.py`.

To add one, append a line to ``CASES``:

- a function: ``Case(name, fast, plain, activations, weights)`` (``activations(batch, time)`` gives float64 or integer
  tensors that all begin with the batch, ``weights()`` what the batch shares; both functions take the activations, then
  the weights, and return one tensor). ``plain`` is the formula in a few lines without a hand-written derivative;
- a layer: ``layer(name, build, plain, activations)``: its parameters, in their order, are the weights.

``products=True`` says that autocast computes it in its own dtype; ``recorded=True`` that PyTorch records products of
it, whose backward pass rounds them where it runs inside of autocast's region, as with all of PyTorch's own.
``loss=True``: the result is float32 at least, whatever the activations are. ``dynamic`` names the axes besides the
batch that an exported program leaves open: 1 where the time is the second axis of every activation, None where a size
is part of the function. ``slack`` multiplies what 16 bits may round (deep networks, iterations); ``heavy`` tries
compilers in one way only. ``raises`` names the conditions under which there is no right answer, each with words of the
one error that says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tensors import gaussian
from torch import Tensor, nn

from danlu.nn import (
    FeedForward,
    Linear,
    RMSNorm,
    SquarePlus,
    SquarePlusConfig,
    linear_cross_entropy,
    rotary_angles,
    rotate,
    squareplus,
    swiglu,
)
from danlu.nn.attention.blocked import blocked_attention
from danlu.nn.grouped import routed_experts
from danlu.nn.ssm import causal_convolution

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One function with its plain formula; see the module."""

    name: str
    fast: Function
    plain: Function
    activations: Callable[[int, int], tuple[Tensor, ...]]
    weights: Callable[[], tuple[Tensor, ...]] = tuple
    products: bool = False
    recorded: bool = False
    loss: bool = False
    dynamic: int | None = 1
    slack: float = 1
    heavy: bool = False
    raises: Mapping[str, str] = field(default_factory=dict)


def layer(
    name: str,
    build: Callable[[], nn.Module],
    plain: Function,
    activations: Callable[[int, int], tuple[Tensor, ...]],
    *,
    products: bool = False,
    dynamic: int | None = 1,
    slack: float = 1,
    heavy: bool = False,
    loss: bool = False,
    recorded: bool = False,
    raises: Mapping[str, str] | None = None,
) -> Case:
    """Return the case of a layer; ``plain`` takes the activations and its parameters in their order."""
    torch.manual_seed(0)
    module = build().double()
    names = [name for name, _ in module.named_parameters()]
    values = tuple(parameter.detach() + 0.1 * gaussian(*parameter.shape) for parameter in module.parameters())

    def fast(*inputs: Tensor) -> Tensor:
        x, weights = inputs[: len(inputs) - len(names)], inputs[len(inputs) - len(names) :]
        device = weights[0].device
        buffers = {name: buffer.to(device) for name, buffer in module.named_buffers()}
        y: Tensor = torch.func.functional_call(module, buffers | dict(zip(names, weights)), x)
        return y

    return Case(
        name, fast, plain, activations, lambda: values, products=products, recorded=recorded, loss=loss,
        dynamic=dynamic, slack=slack, heavy=heavy, raises=raises or {},
    )  # fmt: skip


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain


def gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


def feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return gated(x @ gate_up.T) @ down.T


def rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., 2:].chunk(2, dim=-1)
    return torch.cat((x[..., :2], x[..., 2:] * cos + torch.cat((-second, first), -1) * sin), -1)


def rotate_by(x: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1], dtype=frequencies.dtype, device=x.device)[:, None] * frequencies
    angles = angles.repeat(1, 2)
    return rotate(x, angles.cos(), angles.sin())


def rotation_by(x: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1], dtype=frequencies.dtype, device=x.device)[:, None] * frequencies
    angles = angles.repeat(1, 2)
    return rotation(x, angles.cos(), angles.sin())


def cross_entropy(z_loss: float) -> Function:
    def plain(x: Tensor, targets: Tensor, w: Tensor) -> Tensor:
        log_z = (x @ w.T).logsumexp(-1)
        right = (x * F.embedding(targets.clamp_min(0), w)).sum(-1)
        return ((log_z + z_loss * log_z**2 - right) * (targets != -100)).sum()

    return plain


def convolution(u: Tensor, k: Tensor) -> Tensor:
    time = u.shape[-1]
    past = torch.arange(time)[:, None] - torch.arange(time)
    matrix = torch.where(past >= 0, k[:, past.clamp_min(0)], 0.0)
    return (matrix @ u[..., None])[..., 0]


def experts(x: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    y = routed_experts(x.flatten(0, 1), gate.flatten(0, 1), chosen.flatten(0, 1), w_up, w_down)
    return y.view(x.shape)


def sum_of_experts(x: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for e in range(len(w_up)):
        weight = (gate * (chosen == e)).sum(-1, keepdim=True)
        total = total + weight.to(x.dtype) * (gated(x @ w_up[e].T) @ w_down[e].T)
    return total


def with_choices(b: int, t: int) -> tuple[Tensor, ...]:
    first = torch.arange(b * t).view(b, t, 1) * 3 % 5
    return gaussian(b, t, 6, seed=1), gaussian(b, t, 2, seed=2).sigmoid(), torch.cat((first, (first + 2) % 5), -1)


def blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return blocked_attention(q, k, v, causal=True, scale=0.3)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (0.3 * q @ k.mT).masked_fill(later, -torch.inf).softmax(-1) @ v


def heads(b: int, t: int) -> tuple[Tensor, ...]:
    return gaussian(b, 4, 5, 2, seed=1), gaussian(b, 2, 5, 2, seed=2), gaussian(b, 2, 5, 2, seed=3)


def numbers(*sizes: int) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Return activations ``(batch, time, *sizes)``."""
    return lambda b, t: (gaussian(b, t, *sizes, seed=1),)


def with_targets(b: int, t: int) -> tuple[Tensor, ...]:
    targets = torch.arange(b * t).view(b, t) * 5 % 11
    return gaussian(b, t, 6, seed=1), targets.where(targets % 4 != 3, -100)


CASES = [
    Case("swiglu", swiglu, gated, numbers(10)),
    Case("squareplus", squareplus, lambda x: (x + (x**2 + 4).sqrt()) / 2, numbers(5)),
    Case("squareplus, b", squareplus, lambda x, b: (x + (x**2 + b).sqrt()) / 2, numbers(5),
         lambda: (gaussian(5).abs() + 0.1,)),
    Case("rotate", rotate, rotation, lambda b, t: (gaussian(b, 7, 8, seed=1),),
         lambda: rotary_angles(torch.arange(7, dtype=torch.float64), 6), dynamic=None),
    Case("rotate, learned", rotate_by, rotation_by, numbers(8), lambda: (gaussian(3, seed=2),)),
    Case("linear_cross_entropy", lambda x, t, w: linear_cross_entropy(x, w, t, chunk=4), cross_entropy(0.0),
         with_targets, lambda: (gaussian(11, 6, seed=2),), products=True, loss=True),
    Case("linear_cross_entropy, z_loss", lambda x, t, w: linear_cross_entropy(x, w, t, z_loss=0.1), cross_entropy(0.1),
         with_targets, lambda: (gaussian(11, 6, seed=2),), products=True, loss=True),
    Case("causal_convolution", causal_convolution, convolution, lambda b, t: (gaussian(b, 3, 9, seed=1),),
         lambda: (gaussian(3, 9, seed=2),), dynamic=None),
    Case("experts", experts, sum_of_experts, with_choices,
         lambda: (gaussian(5, 8, 6, seed=3), gaussian(5, 6, 4, seed=4)), products=True),
    Case("blocked attention", blocked, attention, heads, products=True, dynamic=None),
    layer("RMSNorm", lambda: RMSNorm(8), rms_norm, numbers(8)),
    layer("FeedForward", lambda: FeedForward(6, 5), feed_forward, numbers(6), products=True),
    layer("Linear", lambda: Linear(6, 5), lambda x, w: x @ w.T, numbers(6), products=True),
    layer("SquarePlus", lambda: SquarePlus(SquarePlusConfig(learnable=True)),
          lambda x, root: (x + (x**2 + root**2).sqrt()) / 2, numbers(5)),
]  # fmt: skip
"""Every hand-written function and the layers made of them."""
