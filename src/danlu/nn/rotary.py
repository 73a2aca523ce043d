r"""Rotary position embedding (Su et al., arXiv 2104.09864), in one dimension.

Coordinate pairs ``(j, j + d/2)`` of a query or key at position ``t`` are rotated by the angle
``t * base^(-2j/d)``, so that the inner product of a query and a key depends on the difference of their positions
only. The pairing is the half-split one of GPT-NeoX, Llama and of DeepSeek-V3 with ``rope_interleave=False``.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from danlu._validate import integer, positive

_FEW = 16384
"""Coordinates up to which the number of calls counts, not the memory they pass over: a decoded token."""


def rotary_angles(positions: Tensor, dim: int, *, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, each ``positions.shape + (dim,)``, in float32 (float64 for float64).

    Args:
        positions: real or integer positions, any shape; fractional positions are as good as whole ones.
        dim: rotated size, even; 0 gives empty tables (a network without positions).
        base: period scale theta, 10000 unless the model says otherwise.

    Raises:
        ValueError: ``dim`` is odd or negative, or ``base`` is not positive.

    >>> cos, sin = rotary_angles(torch.arange(3), 4)
    >>> cos.shape, [round(c, 3) for c in cos[1].tolist()]
    (torch.Size([3, 4]), [0.54, 1.0, 0.54, 1.0])
    """
    integer("dim", dim, low=0)
    positive("base", base)
    if dim % 2:
        raise ValueError(f"dim must be even (coordinates are rotated in pairs), got {dim}")
    # Angles are formed in float64: at position 1e6 a float32 product would already be wrong in the third digit.
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / max(dim, 1)
    angles = positions.to(torch.float64)[..., None] * base**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    dtype = torch.float64 if positions.dtype == torch.float64 else torch.float32
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=16)
def _table(rows: int, dim: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        positions = torch.arange(rows, device=device)
        cos, sin = rotary_angles(positions.double() if dtype == torch.float64 else positions, dim, base=base)
        return cos.to(dtype), sin.to(dtype)


def rotary_span(start: int, end: int, dim: int, *, base: float = 10000.0, like: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of `rotary_angles` for the positions ``start`` to ``end - 1``, in dtype and on the device of ``like``.

    They are views of one table that is kept, so that a decoded token does not pay for its angles.

    >>> cos, sin = rotary_span(3, 5, 6, like=torch.empty(0))
    >>> torch.equal(cos, rotary_angles(torch.arange(3, 5), 6)[0])
    True
    """
    rows = 1 << max(end - 1, 255).bit_length()
    # A compiler makes its own constants, and must not write into ours.
    table = _table.__wrapped__ if torch.compiler.is_compiling() else _table
    cos, sin = table(rows, dim, base, like.dtype, like.device)
    return cos[start:end], sin[start:end]


def _rotate_into(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    kept = x.shape[-1] - 2 * half
    y = torch.empty_like(x)
    y[..., :kept] = x[..., :kept]
    first, second = x[..., kept : kept + half], x[..., kept + half :]
    c, s = cos[..., :half], sin[..., :half]
    torch.mul(first, c, out=y[..., kept : kept + half]).addcmul_(second, s, value=-1)
    torch.mul(second, c, out=y[..., kept + half :]).addcmul_(first, s)
    return y


class _Rotate(torch.autograd.Function):
    """The rotation is linear and orthogonal: its backward is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_into(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        y: Tensor = _Rotate.apply(grad, cos, -sin)
        return y, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last ``cos.shape[-1]`` coordinates of ``x`` ``(..., dim)``, leave those before them as they are.

    The tables broadcast against ``x``; the result keeps its dtype. The inverse is ``rotate(x, cos, -sin)``.

    >>> cos, sin = rotary_angles(torch.arange(5), 6)
    >>> x = torch.randn(5, 8)
    >>> y = rotate(x, cos, sin)
    >>> torch.equal(y[:, :2], x[:, :2]), torch.allclose(rotate(y, cos, -sin), x, atol=1e-6)
    (True, True)
    """
    size = cos.shape[-1]
    if size == 0:
        return x
    if size > x.shape[-1]:
        raise ValueError(f"the tables rotate {size} coordinates, x has only {x.shape[-1]}")
    if cos.dtype != x.dtype:
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    few = not torch.is_grad_enabled() and x.numel() <= _FEW
    if few or torch.compiler.is_compiling():
        kept = x.shape[-1] - size
        turned = x[..., kept:] if kept else x
        first, second = turned.chunk(2, dim=-1)
        turned = torch.addcmul(turned * cos, torch.cat((-second, first), dim=-1), sin)
        return torch.cat((x[..., :kept], turned), dim=-1) if kept else turned
    if not torch.is_grad_enabled():
        return _rotate_into(x, cos, sin)
    y: Tensor = _Rotate.apply(x, cos, sin)
    return y
