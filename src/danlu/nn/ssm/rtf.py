r"""RTF: a state space given by its rational transfer function (Parnichkun et al., arXiv 2405.06147).

The truncated kernel has the generating function

    ``sum_{k<L} K_k z^k = (b_1 + b_2 z + ... + b_d z^{d-1}) / (1 + a_1 z + ... + a_d z^d)``  at ``z^L = 1``,

so that two transforms of the coefficients and an inverse one give it in ``O(L log L)``, whatever the order ``d < L``.
For decoding the companion form of the same system takes over: ``x <- [u - a . x, x_1, ..., x_{d-1}]``, ``y = C . x``,
with ``C = b (I - Abar^L)^{-1}``: ``b`` belongs to the truncated kernel, and the recurrence does not truncate.

Shape suffixes: h channels, d order, b batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu._roles import declare
from danlu._validate import integer
from danlu.nn.ssm.blocks import Blocks, form_blocks
from danlu.nn.ssm.s4d import wide


@dataclass(frozen=True, kw_only=True)
class RTFConfig:
    """Sizes of an `RTF` kernel."""

    state: int = 64
    """order d: elements of the state per channel"""
    length: int = 1024
    """longest sequence of the convolution, above state; the numerator means nothing without it"""

    def build(self, channels: int, **others: Any) -> "RTF":
        """Make ``channels`` independent state spaces."""
        return RTF(channels, self)


def rational_kernel(a: Tensor, b: Tensor, length: int) -> Tensor:
    """``IDFT(DFT(b) / DFT(1, a))``: ``(..., length)``.

    Args:
        a: denominator without its leading 1, ``(..., d)``.
        b: numerator of the truncated kernel, ``(..., d)``.
        length: above d.

    Raises:
        ValueError: coefficients that do not fit into the length.

    >>> rational_kernel(torch.zeros(2), torch.tensor([3.0, 4.0]), 4).round(decimals=4)
    tensor([3., 4., 0., 0.])
    """
    if length <= a.shape[-1] or a.shape != b.shape:
        raise ValueError(f"length must be above the order, got {length} for {tuple(a.shape)} and {tuple(b.shape)}")
    denominator = torch.cat((torch.ones_like(a[..., :1]), a), dim=-1)
    ratio = torch.fft.rfft(b, n=length) / torch.fft.rfft(denominator, n=length)
    kernel: Tensor = torch.fft.irfft(ratio, n=length)
    return kernel


def companion(a: Tensor) -> Tensor:
    """``Abar`` ``(..., d, d)`` of the recurrence: ``-a`` in the first row, ones below the diagonal.

    >>> companion(torch.tensor([0.5, -0.25])).tolist()
    [[-0.5, 0.25], [1.0, 0.0]]
    """
    d = a.shape[-1]
    shift = torch.eye(d, dtype=a.dtype, device=a.device)[:-1].expand(*a.shape[:-1], d - 1, d)
    return torch.cat((-a[..., None, :], shift), dim=-2)


def is_stable(a: Tensor) -> Tensor:
    """Whether every root of ``z^d + a_1 z^{d-1} + ... + a_d`` lies inside the unit disc: ``(...)``, boolean.

    By the Schur-Cohn recursion: the polynomial is stepped down one degree at a time, and each last coefficient has to
    be below 1 in size. ``sum |a_i| < 1`` suffices, and is not necessary.

    >>> is_stable(torch.tensor([[-1.7, 0.72], [-2.0, 0.99]]))
    tensor([ True, False])
    """
    stable = torch.ones(a.shape[:-1], dtype=torch.bool, device=a.device)
    a = a.double()
    while a.shape[-1]:
        last = a[..., -1:]
        stable = stable & (last[..., 0].abs() < 1)
        a = (a[..., :-1] - last * a[..., :-1].flip(-1)) / (1 - last.square())
    return stable


def transfer_function(A: Tensor, B: Tensor, C: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """``a`` and ``b`` of a discrete system whose kernel is ``C A^k B``, truncated at ``length``.

    ``a`` are the coefficients of ``det(lambda I - A)``, ``b`` those of ``det(lambda I - A + B C~) - det(lambda I - A)``
    with ``C~ = C (I - A^L)``. Roots of high order lose digits: meant for orders of a few dozen at most.

    Args:
        A: ``(d, d)``, float64.
        B: ``(d,)``.
        C: ``(d,)``.
        length: L, above d.
    """
    truncated = C - C @ torch.linalg.matrix_power(A, length)

    def characteristic(M: Tensor) -> Tensor:
        coefficients = torch.ones(1, dtype=torch.complex128)
        for root in torch.linalg.eigvals(M):
            padded = torch.nn.functional.pad(coefficients, (0, 1))
            coefficients = padded - root * torch.nn.functional.pad(coefficients, (1, 0))
        return coefficients.real

    a = characteristic(A)
    return a[1:], (characteristic(A - torch.outer(B, truncated)) - a)[1:]


class RTF(nn.Module):
    """State spaces by their transfer functions: ``2 d`` parameters per channel, a kernel free of the order.

    Args:
        channels: independent systems, one input and one output each.
        config: sizes.

    Raises:
        ValueError: a length that is not above the order.

    >>> layer = RTF(3, RTFConfig(state=4, length=8))
    >>> layer.kernel(5).shape
    torch.Size([3, 5])
    """

    def __init__(self, channels: int, config: RTFConfig | None = None) -> None:
        super().__init__()
        config = RTFConfig() if config is None else config
        integer("channels", channels)
        integer("state", config.state)
        integer("length", config.length, low=config.state + 1)
        self.config, self.channels, self.state = config, channels, config.state
        self.a = nn.Parameter(torch.empty(channels, config.state))
        declare(self, "a", "gain")
        self.b = nn.Parameter(torch.empty(channels, config.state))
        declare(self, "b", "gain")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``a = 0``, a shift register; ``b`` normal of variance ``1 / state``."""
        nn.init.zeros_(self.a)
        nn.init.normal_(self.b, std=self.state**-0.5)

    def kernel(self, length: int) -> Tensor:
        """``(channels, length)``: the response to an impulse.

        Raises:
            ValueError: more than the config's length.
        """
        integer("length", length, high=self.config.length)
        return rational_kernel(wide(self.a), wide(self.b), self.config.length)[:, :length]

    @torch.no_grad()
    def system(self) -> tuple[Tensor, ...]:
        """What `step` needs of the weights, solved for in float64.

        Raises:
            ValueError: a channel whose recurrence would grow without bound.
        """
        stable = is_stable(self.a)
        if not stable.all():
            raise ValueError(f"{int((~stable).sum())} of {self.channels} channels are not stable and cannot be stepped")
        a, b = self.a.double(), self.b.double()
        power = torch.linalg.matrix_power(companion(a), self.config.length)
        eye = torch.eye(self.state, dtype=power.dtype, device=power.device)
        c = torch.linalg.solve((eye - power).mT, b[..., None])[..., 0]
        dtype = wide(self.a).dtype
        return a.to(dtype), c.to(dtype)

    def new_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zero state ``(batch, channels, state)``."""
        return torch.zeros(batch, self.channels, self.state, dtype=dtype, device=device)

    @staticmethod
    def dense(system: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The step's matrices: ``(channels, N, N)``, ``(channels, N)`` and ``(channels, N)``."""
        a, c = system
        return companion(a), F.pad(torch.ones_like(a[:, :1]), (0, a.shape[1] - 1)), c

    @staticmethod
    def blocks(system: tuple[Tensor, ...], size: int) -> Blocks:
        """The step for ``size`` tokens at once, a power of two."""
        return form_blocks(*RTF.dense(system), size)

    @staticmethod
    def step(system: tuple[Tensor, ...], state: Tensor, u_bh: Tensor) -> tuple[Tensor, Tensor]:
        """One token in ``O(state)``: the new state and the output ``(batch, channels)``."""
        a, c = system
        newest = u_bh - (a * state).sum(-1)
        state = torch.cat((newest[..., None], state[..., :-1]), dim=-1)
        return state, (c * state).sum(-1)
