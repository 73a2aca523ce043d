r"""S4: a state space that starts as HiPPO-LegS, in diagonal-plus-low-rank form (Gu et al., arXiv 2111.00396).

With ``v = sqrt(2n+1)`` the matrix ``A + v v^T / 2 + I / 2`` of `danlu.nn.ssm.legs` is skew-symmetric, so that a
unitary ``U`` gives ``U A U^* = Lambda - p p^*`` with ``Re Lambda = -1/2`` and ``p = U v / sqrt 2``; diagonalising ``A``
itself is hopeless (eigenvectors of condition 1e20 at 64). Discretised by the bilinear rule,

    ``Abar = (I - h A/2)^{-1} (I + h A/2)``,  ``Bbar = h (I - h A/2)^{-1} B``,  ``K_k = C Abar^k Bbar``.

``Lambda`` comes in conjugate pairs and one of each is kept. Two ways to the kernel:

* `generating_function`: S4's own. ``sum_{k<L} K_k z^k`` at the roots of unity needs one Cauchy matrix; written for a
  pair of conjugates it is real arithmetic. It knows the truncated ``C (I - Abar^L)`` only.
* `S4.kernel`: ``K_{i + r j} = (C Abar^{r j}) (Abar^i Bbar)``, both factors grown by doubling. ``Abar`` is a contraction
  in the unitary basis, so that its powers lose no digits; the work beyond ``O(L N)`` is ``log L`` products of N x N
  matrices, no length is built in and no inverse transform is needed. It is what trains.

Shape suffixes: h channels, n half the state, N state, b batch.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danlu._roles import declare
from danlu._validate import integer
from danlu.nn.ssm.blocks import Blocks, form_blocks, rotation
from danlu.nn.ssm.hippo import legs
from danlu.nn.ssm.s4d import check_system, draw_log_steps, wide


@dataclass(frozen=True, kw_only=True)
class S4Config:
    """Sizes and start of an `S4` kernel."""

    state: int = 64
    """real elements of the state per channel, even"""
    dt_min: float = 1e-3
    """shortest step at the start; drawn log-uniformly for each channel"""
    dt_max: float = 0.1
    """longest step at the start"""

    def build(self, channels: int, **others: Any) -> "S4":
        """Make ``channels`` independent state spaces."""
        return S4(channels, self)


def legs_dplr(d: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""LegS in diagonal-plus-low-rank form, one of each conjugate pair.

    ``A = U^* (Lambda - p p^*) U`` and ``U B`` for the orthonormal `legs`; the other half is the conjugate.

    Args:
        d: size, even.

    Returns:
        ``Lambda`` (positive imaginary parts, ascending), ``p`` and ``U B``, each ``(d / 2,)`` complex128.

    Raises:
        ValueError: an odd size.

    >>> legs_dplr(4)[0].imag.round(decimals=6).tolist()
    [0.556501, 4.603293]
    """
    integer("d", d, low=2)
    if d % 2:
        raise ValueError(f"d must be even (eigenvalues come in conjugate pairs), got {d}")
    A, B = legs(d)
    v = (2 * torch.arange(d, dtype=torch.float64) + 1).sqrt()
    skew = A + torch.outer(v, v) / 2
    skew = (skew - skew.T) / 2  # the identity's half is the real part, exactly
    imag, rows = torch.linalg.eigh(-1j * skew)
    half = slice(d // 2, None)
    basis = rows[:, half].mH
    return (
        torch.complex(torch.full_like(imag[half], -0.5), imag[half]),
        basis @ (v / math.sqrt(2) + 0j),
        basis @ (B + 0j),
    )


def real_form(eigenvalues: Tensor, p: Tensor) -> Tensor:
    """``Lambda - p p^*`` acting on ``[Re x, Im x]`` of one half of a conjugate-symmetric vector: ``(..., N, N)`` real.

    Args:
        eigenvalues: ``(..., n)`` complex.
        p: ``(..., n)`` complex.
    """
    q = torch.cat((p.real, p.imag), dim=-1)
    return rotation(eigenvalues) - 2 * q[..., :, None] * q[..., None, :]


def krylov_kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """``C A^k B`` for ``k < length``: ``(channels, length)``, by doubling.

    Args:
        A: ``(channels, N, N)``, discrete.
        B: ``(channels, N)``.
        C: ``(channels, N)``.
        length: number of powers.

    >>> krylov_kernel(torch.tensor([[[0.5]]]), torch.ones(1, 1), torch.ones(1, 1), 4)
    tensor([[1.0000, 0.5000, 0.2500, 0.1250]])
    """
    columns = 1 << (max(length - 1, 1).bit_length() + 1) // 2
    rows = -(-length // columns)
    right, left, power = B[..., None], C[..., None, :], A
    while right.shape[-1] < columns:  # right holds A^i B for i below its width, power is A to that width
        right = torch.cat((right, torch.bmm(power, right)), dim=-1)
        power = torch.bmm(power, power)
    while left.shape[-2] < rows:
        left = torch.cat((left, torch.bmm(left, power)), dim=-2)
        if left.shape[-2] < rows:
            power = torch.bmm(power, power)
    return torch.bmm(left[..., :rows, :], right).flatten(1)[:, :length]


def generating_function(eigenvalues: Tensor, p: Tensor, b: Tensor, c: Tensor, step: Tensor, length: int) -> Tensor:
    r"""S4's kernel from its values at the roots of unity: ``(channels, length)``.

    ``G(z) = 2/(1+z) C (R^{-1} - R^{-1} p (1 + p^* R^{-1} p)^{-1} p^* R^{-1}) B`` with
    ``R = (2/h) (1-z)/(1+z) - Lambda``, at ``z = e^{-2 pi i l / L}``. There ``(1-z)/(1+z) = i tan(pi l / L)``, so that
    a pair gives ``(2 i omega Re w - 2 Re(w conj(lambda))) / ((|lambda|^2 - omega^2) - 2 i omega Re lambda)``. At
    ``z = -1`` the form is infinity times zero and its limit ``(h/2) C B`` is taken.

    Args:
        eigenvalues: ``Lambda``, ``(channels, n)`` complex, one of each pair.
        p: low-rank factor, likewise.
        b: input vector, likewise.
        c: **truncated** output vector ``C (I - Abar^L)``, likewise; outputs are ``2 Re(c . x)``.
        step: ``h``, ``(channels,)``.
        length: L.
    """
    integer("length", length)
    count = length // 2 + 1
    l = torch.arange(count, dtype=step.dtype, device=step.device)  # noqa: E741
    end = length % 2 == 0  # z = -1 is the last node
    tangent = torch.tan(math.pi * (l[:-1] if end else l) / length)
    omega = (2 / step)[:, None] * tangent
    # One of each pair: w/(s - lambda) + conj(w)/(s - conj(lambda)), s = i omega.
    re, size = eigenvalues.real, eigenvalues.real.square() + eigenvalues.imag.square()
    den_re = size[..., None] - omega[:, None].square()
    den_im = -2 * re[..., None] * omega[:, None]
    scale = (den_re.square() + den_im.square()).reciprocal()
    inverse = torch.cat((den_re * scale, -den_im * scale), dim=-1)  # (h, n, 2 f)
    weights = torch.stack((c * b, c * p, p.conj() * b, p.conj() * p), dim=1)
    flat = torch.cat((weights.real, -(weights * eigenvalues[:, None].conj()).real), dim=1)
    sums = 2 * torch.bmm(flat, inverse)  # (h, 8, 2 f)
    slope, constant = (torch.complex(*part.chunk(2, dim=-1)) for part in sums.chunk(2, dim=1))
    cb, cp, pb, pp = (1j * omega[:, None] * slope + constant).unbind(1)
    nodes = torch.polar(torch.ones_like(l), -2 * math.pi * l / length)
    values = 2 / (1 + nodes[: cb.shape[-1]]) * (cb - cp * pb / (1 + pp))
    if end:
        limit = step * (c * b).sum(-1).real
        values = torch.cat((values, torch.complex(limit, torch.zeros_like(limit))[:, None]), dim=-1)
    kernel: Tensor = torch.fft.irfft(values, n=length)
    return kernel


class S4(nn.Module):
    """State spaces that start from LegS, diagonal plus low rank, with the bilinear step.

    Args:
        channels: independent systems, one input and one output each.
        config: sizes and start.

    Raises:
        ValueError: an odd state, or steps that are not ``0 < dt_min <= dt_max``.

    >>> layer = S4(3, S4Config(state=4))
    >>> layer.kernel(5).shape
    torch.Size([3, 5])
    """

    def __init__(self, channels: int, config: S4Config | None = None) -> None:
        super().__init__()
        config = S4Config() if config is None else config
        check_system(channels, config.state, config.dt_min, config.dt_max)
        self.config, self.channels, self.state = config, channels, config.state
        half = config.state // 2
        self.log_dt = nn.Parameter(torch.empty(channels))
        declare(self, "log_dt", "gain")
        self.log_decay = nn.Parameter(torch.empty(channels, half))
        declare(self, "log_decay", "gain")
        self.frequency = nn.Parameter(torch.empty(channels, half))
        declare(self, "frequency", "gain")
        self.p = nn.Parameter(torch.empty(channels, half, 2))
        declare(self, "p", "gain")
        self.b = nn.Parameter(torch.empty(channels, half, 2))
        declare(self, "b", "gain")
        self.c = nn.Parameter(torch.empty(channels, half, 2))
        declare(self, "c", "gain")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LegS, steps log-uniform, ``c`` complex normal of variance 1."""
        with torch.device("cpu"):
            eigenvalues, p, b = legs_dplr(self.state)
        with torch.no_grad():
            draw_log_steps(self.log_dt, self.config.dt_min, self.config.dt_max)
            self.log_decay.copy_((-eigenvalues.real).log())
            self.frequency.copy_(eigenvalues.imag)
            self.p.copy_(torch.view_as_real(p))
            self.b.copy_(torch.view_as_real(b))
            self.c.normal_(std=math.sqrt(0.5))

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``Lambda``, ``p``, ``b``, ``c`` (each ``(channels, state / 2)`` complex) and the steps ``(channels,)``."""
        eigenvalues = torch.complex(-wide(self.log_decay).exp(), wide(self.frequency))
        p, b, c = (torch.view_as_complex(wide(t).contiguous()) for t in (self.p, self.b, self.c))
        return eigenvalues, p, b, c, wide(self.log_dt).exp()

    def discrete(self) -> tuple[Tensor, ...]:
        """The bilinear step as diagonal minus rank one: ``x -> a x - w Re(sum conj(g) x) + bbar u``, ``y = 2 Re(c x)``.

        Woodbury's formula for ``(I - h A/2)^{-1}`` keeps the form. Returns ``a, w, g, bbar, c``, each
        ``(channels, state / 2)`` complex.
        """
        eigenvalues, p, b, c, step = self.continuous()
        h = step[:, None]
        d = (1 - h / 2 * eigenvalues).reciprocal()
        w, size = d * p, 1 + h * (d * p * p.conj()).sum(-1, keepdim=True).real
        bbar = h * (d * b - w * (h / size) * (p.conj() * d * b).sum(-1, keepdim=True).real)
        return 2 * d - 1, w * (2 * h / size), (d * p.conj()).conj(), bbar, c

    def kernel(self, length: int) -> Tensor:
        """``(channels, length)``: the response to an impulse."""
        return krylov_kernel(*self.dense(self.discrete()), length)

    @torch.no_grad()
    def system(self) -> tuple[Tensor, ...]:
        """What `step` needs of the weights."""
        return self.discrete()

    def new_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zero state ``(batch, channels, state / 2)``, complex."""
        return torch.zeros(batch, self.channels, self.state // 2, dtype=dtype.to_complex(), device=device)

    @staticmethod
    def dense(system: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The step's matrices on ``[Re x, Im x]``: ``(channels, N, N)``, ``(channels, N)`` and ``(channels, N)``."""
        a, w, g, bbar, c = system
        left, right = torch.cat((w.real, w.imag), -1), torch.cat((g.real, g.imag), -1)
        matrix = rotation(a) - left[..., None] * right[..., None, :]
        return matrix, torch.cat((bbar.real, bbar.imag), -1), 2 * torch.cat((c.real, -c.imag), -1)

    @staticmethod
    def blocks(system: tuple[Tensor, ...], size: int) -> Blocks:
        """The step for ``size`` tokens at once, a power of two."""
        return form_blocks(*S4.dense(system), size)

    @staticmethod
    def step(system: tuple[Tensor, ...], state: Tensor, u_bh: Tensor) -> tuple[Tensor, Tensor]:
        """One token in ``O(state)``: the new state and the output ``(batch, channels)``."""
        a, w, g, bbar, c = system
        coupling = (g.conj() * state).real.sum(-1, keepdim=True)
        state = a * state - w * coupling + bbar * u_bh[..., None]
        return state, 2 * (c * state).real.sum(-1)
