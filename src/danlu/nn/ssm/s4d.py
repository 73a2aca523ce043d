r"""S4D: a diagonal state space, each channel its own (Gu et al., arXiv 2206.11893).

``x' = A x + u``, ``y = 2 Re(c . x)`` with diagonal ``A`` of ``state / 2`` complex numbers (the other half are their
conjugates), held inputs and the exact step: ``x_{k+1} = e^{dt A} x_k + A^{-1} (e^{dt A} - 1) u_k``. The convolution
kernel is a sum of powers,

    ``K_k = 2 Re sum_n c_n b_n z_n^k``,  ``z = e^{dt A}``,  ``b = (z - 1) / A``.

Written with ``k = i + r j`` it factors into powers ``z^i`` and ``(z^r)^j``, so that the exponentials
are ``2 sqrt(L)`` columns instead of ``L``, and the rest is one small matrix product a channel.

Shape suffixes: h channels, n half the state, b batch.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from danlu._roles import declare
from danlu._validate import choice, integer, positive
from danlu.nn.ssm.blocks import Blocks, blocks_of

Init = Literal["lin", "inv"]


@dataclass(frozen=True, kw_only=True)
class S4DConfig:
    """Sizes and start of an `S4D` kernel."""

    state: int = 64
    """real elements of the state per channel, even"""
    init: Init = "lin"
    """frequencies at the start: pi n, or (N / pi) (N / (2 n + 1) - 1)"""
    dt_min: float = 1e-3
    """shortest step at the start; drawn log-uniformly for each channel"""
    dt_max: float = 0.1
    """longest step at the start"""

    def build(self, channels: int, **others: Any) -> "S4D":
        """Make ``channels`` independent state spaces."""
        return S4D(channels, self)


def check_system(channels: int, state: int, dt_min: float, dt_max: float) -> None:
    """Raise ValueError unless there are channels, the state is even and ``0 < dt_min <= dt_max``."""
    integer("channels", channels)
    integer("state", state, low=2)
    if state % 2:
        raise ValueError(f"state must be even (eigenvalues come in conjugate pairs), got {state}")
    positive("dt_min", dt_min)
    positive("dt_max", dt_max)
    if dt_min > dt_max:
        raise ValueError(f"dt_min must be at most dt_max = {dt_max}, got {dt_min}")


def draw_log_steps(log_dt: Tensor, dt_min: float, dt_max: float) -> None:
    """Fill ``log_dt`` so that its exponential is log-uniform on ``[dt_min, dt_max]``."""
    nn.init.uniform_(log_dt, math.log(dt_min), math.log(dt_max))


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 if its dtype has 16 bits, else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def power_sum(decay_hn: Tensor, angle_hn: Tensor, weight_hn: Tensor, length: int) -> Tensor:
    r"""``2 Re sum_n w_n e^{(decay_n + i angle_n) k}`` for ``k < length``, as ``(channels, length)``.

    Args:
        decay_hn: logarithm of the modulus, real ``(channels, n)``.
        angle_hn: argument, real ``(channels, n)``.
        weight_hn: ``w``, complex ``(channels, n)``.
        length: number of powers.

    >>> power_sum(torch.tensor([[-0.5]]), torch.tensor([[0.0]]), torch.tensor([[0.5 + 0j]]), 3)
    tensor([[1.0000, 0.6065, 0.3679]])
    """
    columns = 1 << (max(length - 1, 1).bit_length() + 1) // 2
    rows = -(-length // columns)
    inner = torch.arange(columns, dtype=decay_hn.dtype, device=decay_hn.device)
    outer = columns * torch.arange(rows, dtype=decay_hn.dtype, device=decay_hn.device)[:, None]

    def powers(exponents: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        decay, angle = decay_hn.unsqueeze(axis) * exponents, angle_hn.unsqueeze(axis) * exponents
        size = decay.exp()
        return size * angle.cos(), size * angle.sin()

    # Re(w z^{rj} z^i) = Re(w z^{rj}) Re(z^i) - Im(w z^{rj}) Im(z^i): one real product of inner size 2 n.
    inner_re, inner_im = powers(inner, -1)
    outer_re, outer_im = powers(outer, 1)
    w_re, w_im = 2 * weight_hn.real[:, None], 2 * weight_hn.imag[:, None]
    left = torch.cat((w_re * outer_re - w_im * outer_im, -(w_re * outer_im + w_im * outer_re)), -1)
    return torch.bmm(left, torch.cat((inner_re, inner_im), 1)).flatten(1)[:, :length]


class S4D(nn.Module):
    """Diagonal state spaces: a convolution kernel for training, a constant-size state for decoding.

    Args:
        channels: independent systems, one input and one output each.
        config: sizes and start.

    Raises:
        ValueError: an odd state, or steps that are not ``0 < dt_min <= dt_max``.

    >>> layer = S4D(3, S4DConfig(state=4))
    >>> layer.kernel(5).shape
    torch.Size([3, 5])
    """

    def __init__(self, channels: int, config: S4DConfig | None = None) -> None:
        super().__init__()
        config = S4DConfig() if config is None else config
        choice("init", config.init, get_args(Init))
        check_system(channels, config.state, config.dt_min, config.dt_max)
        self.config, self.channels, self.state = config, channels, config.state
        half = config.state // 2
        self.log_dt = nn.Parameter(torch.empty(channels))
        declare(self, "log_dt", "gain")
        self.log_decay = nn.Parameter(torch.empty(channels, half))
        declare(self, "log_decay", "gain")
        self.frequency = nn.Parameter(torch.empty(channels, half))
        declare(self, "frequency", "gain")
        self.c = nn.Parameter(torch.empty(channels, half, 2))
        declare(self, "c", "gain")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``Re A = -1/2``, frequencies by ``init``, steps log-uniform, ``c`` complex normal of variance 1."""
        n, size = torch.arange(self.state // 2), self.state
        lin = math.pi * n
        with torch.no_grad():
            draw_log_steps(self.log_dt, self.config.dt_min, self.config.dt_max)
            self.log_decay.fill_(math.log(0.5))
            self.frequency.copy_(lin if self.config.init == "lin" else size / math.pi * (size / (2 * n + 1) - 1))
            self.c.normal_(std=math.sqrt(0.5))

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decay and angle of ``z``, ``z`` itself and ``c b``, each ``(channels, state / 2)``."""
        dt = wide(self.log_dt).exp()[:, None]
        re, im = -wide(self.log_decay).exp(), wide(self.frequency)
        decay, angle = re * dt, im * dt
        z = torch.polar(decay.exp(), angle)
        c = torch.view_as_complex(wide(self.c).contiguous())
        return decay, angle, z, c * (z - 1) / torch.complex(re, im)

    def kernel(self, length: int) -> Tensor:
        """``(channels, length)``: the response to an impulse."""
        decay, angle, _, weight = self._discrete()
        return power_sum(decay, angle, weight, length)

    @torch.no_grad()
    def system(self) -> tuple[Tensor, ...]:
        """What `step` needs of the weights: ``z`` and ``c b`` (the input enters the state with weight 1)."""
        _, _, z, weight = self._discrete()
        return z, weight

    def new_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zero state ``(batch, channels, state / 2)``, complex."""
        return torch.zeros(batch, self.channels, self.state // 2, dtype=dtype.to_complex(), device=device)

    @staticmethod
    def blocks(system: tuple[Tensor, ...], size: int) -> Blocks:
        """The step for ``size`` tokens at once, a power of two."""
        z, weight = system
        powers = z[:, None]
        while powers.shape[1] < size:
            powers = torch.cat((powers, powers * powers[:, -1:]), 1)
        enters = torch.cat((torch.ones_like(z)[:, None], powers[:, :-1]), 1)
        leaves = 2 * weight[:, None] * powers
        return blocks_of(
            powers[:, -1],
            torch.cat((enters.real, enters.imag), -1),
            torch.cat((leaves.real, -leaves.imag), -1),
            2 * torch.cat((weight.real, -weight.imag), -1),
        )

    @staticmethod
    def step(system: tuple[Tensor, ...], state: Tensor, u_bh: Tensor) -> tuple[Tensor, Tensor]:
        """One token: the new state and the output ``(batch, channels)``."""
        z, weight = system
        state = torch.addcmul(u_bh[..., None].to(z.dtype), state, z)
        return state, 2 * (weight * state).real.sum(-1)
