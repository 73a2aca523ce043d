r"""Rotary position embedding (Su et al., arXiv 2104.09864): in one dimension, in several, and for text with images.

Coordinate pairs ``(j, j + d/2)`` of a query or key at position ``t`` are rotated by the angle
``t * base^(-2j/d)``, so that the inner product of a query and a key depends on the difference of their positions
only. The pairing is the half-split one of GPT-NeoX, Llama and of DeepSeek-V3 with ``rope_interleave=False``.

In two dimensions (kexue.fm 8397) a position is a pair (row, column) and each coordinate pair of the vector is turned by
one of the two. Where text is to keep its one dimension, the token ``n`` stands at ``(n, n)``; what is left to choose is
where the patches of an image stand (kexue.fm 10040, 10352): `grid_coordinates`.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from danlu._autograd import Fused, compiling, kept, watched
from danlu._grid import text_image_grid
from danlu._validate import choice, integer, number, positive

Layout = Literal["interleaved", "halves"]
Scheme = Literal["tie", "tie-wh", "tv", "unscaled", "flat"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

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
    return _tables(positions.to(torch.float64)[..., None] * base**-exponents, positions.dtype)


def rotary_angles_nd(
    coordinates: Tensor, dim: int, *, base: float = 10000.0, layout: Layout = "interleaved"
) -> tuple[Tensor, Tensor]:
    r"""Cosines and sines for positions of several coordinates, each ``coordinates.shape[:-1] + (dim,)``.

    With ``a`` coordinates, "interleaved" turns the pair ``i`` by ``x_(i mod a) * base^(-2i/dim)``: the frequencies are
    those of one dimension, dealt out in turn, so that a position ``(n, n, ...)`` gives the tables of `rotary_angles` at
    ``n`` bit for bit. "halves" gives each coordinate a run of pairs with all frequencies ``base^(-2aj/dim)``, as vision
    transformers do: exactly symmetric in the coordinates, but no rotation in one dimension.

    Args:
        coordinates: real or integer, ``(..., a)``; in two dimensions row and column.
        dim: rotated size: even for "interleaved", a multiple of ``2a`` for "halves".
        base: period scale theta.
        layout: which coordinate turns which pair.

    Returns:
        Tables for `rotate`, float32 (float64 for float64 coordinates).

    Raises:
        ValueError: a size that cannot be dealt out, an unknown layout, or coordinates without an axis.

    >>> n = torch.arange(7)
    >>> cos, _ = rotary_angles_nd(torch.stack((n, n), dim=-1), 12)
    >>> torch.equal(cos, rotary_angles(n, 12)[0])
    True
    """
    integer("dim", dim, low=0)
    positive("base", base)
    choice("layout", layout, LAYOUTS)
    if coordinates.dim() == 0 or coordinates.shape[-1] == 0:
        raise ValueError(f"coordinates must be (..., axes), got shape {tuple(coordinates.shape)}")
    axes = coordinates.shape[-1]
    unit = 2 if layout == "interleaved" else 2 * axes
    if dim % unit:
        raise ValueError(f"dim must be a multiple of {unit} (layout {layout!r}, {axes} coordinates), got {dim}")
    pairs = torch.arange(dim // 2, device=coordinates.device)
    if layout == "interleaved":
        axis, exponents = pairs % axes, 2 * pairs.double() / max(dim, 1)
    else:
        run = max(dim // unit, 1)
        axis, exponents = pairs // run, 2 * axes * (pairs % run).double() / max(dim, 1)
    return _tables(coordinates.to(torch.float64)[..., axis] * base**-exponents, coordinates.dtype)


def yarn_frequencies(
    dim: int,
    factor: float,
    *,
    base: float = 10000.0,
    original_length: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    r"""Return the angle per position of each rotated pair in YaRN, float64 ``(dim / 2,)``.

    A model trained on ``original_length`` tokens reads ``factor`` times as many: pairs that turn more than
    ``beta_fast`` times over the original length keep their frequency, those below ``beta_slow`` turns are slowed down
    by ``factor``, and a ramp lies between. What the softmax needs with it is `yarn_magnitude`.

    Args:
        dim: rotated size, even.
        factor: new length over the original one, at least 1.
        base: period scale theta.
        original_length: tokens that the model was trained on.
        beta_fast, beta_slow: turns over the original length where the ramp begins and ends.

    Raises:
        ValueError: an odd or negative size, or a number out of range.

    Source: Peng et al., arXiv 2309.00071, with the constants of DeepSeek-V2 (arXiv 2405.04434) as defaults.

    >>> yarn_frequencies(64, 40.0)[[0, 10, 16, 31]]
    tensor([1.0000e+00, 5.6234e-02, 5.5000e-03, 3.3338e-06], dtype=torch.float64)
    """
    integer("dim", dim, low=2)
    if dim % 2:
        raise ValueError(f"dim must be even (coordinates are rotated in pairs), got {dim}")
    number("factor", factor, low=1)
    number("base", base, low=1, low_open=True)
    integer("original_length", original_length)
    positive("beta_slow", beta_slow)
    number("beta_fast", beta_fast, low=beta_slow)

    def pair(turns: float) -> float:
        return dim * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = max(math.floor(pair(beta_fast)), 0), min(math.ceil(pair(beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    ramp = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequencies: Tensor = base ** (-2 * pairs / dim) * (1 - ramp + ramp / factor)
    return frequencies


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """Return ``0.1 mscale ln(factor) + 1``, by which YaRN makes attention sharper: its square multiplies the scores.

    DeepSeek-V2's factor 40 and mscale 0.707 give 1.2608 and, squared, 1.5896; a factor of 1 changes nothing.

    >>> round(yarn_magnitude(40.0, 0.707), 4)
    1.2608
    """
    number("factor", factor, low=1)
    number("mscale", mscale, low=0)
    return 0.1 * mscale * math.log(factor) + 1


def _tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of all pairs, for both members of each."""
    angles = torch.cat((angles, angles), dim=-1)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(dtype), angles.sin().to(dtype)


@kept
def _table(rows: int, dim: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return _part(0, rows, dim, base, dtype, device)


def _part(
    start: int, end: int, dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    positions = torch.arange(start, end, device=device)
    cos, sin = rotary_angles(positions.double() if dtype == torch.float64 else positions, dim, base=base)
    return cos.to(dtype), sin.to(dtype)


# A compiler that saw the formula would put it into every kernel that it fuses with a rotation.
@torch.library.custom_op("danlu::rotary_span", mutates_args=())
def _compiled_part(
    start: int, end: int, dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    cos, sin = _table(_rows(end), dim, base, dtype, device)
    return cos[start:end].clone(), sin[start:end].clone()


@_compiled_part.register_fake
def _(start: int, end: int, dim: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    cos = torch.empty(end - start, dim, dtype=dtype, device=device)
    return cos, torch.empty_like(cos)


def _rows(end: int) -> int:
    return 1 << max(end - 1, 255).bit_length()


def rotary_span(start: int, end: int, dim: int, *, base: float = 10000.0, like: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of `rotary_angles` for the positions ``start`` to ``end - 1``, in dtype and on the device of ``like``.

    They are views of one table that is kept, so that a decoded token does not pay for its angles.

    >>> cos, sin = rotary_span(3, 5, 6, like=torch.empty(0))
    >>> torch.equal(cos, rotary_angles(torch.arange(3, 5), 6)[0])
    True
    """
    if compiling():
        cos, sin = _compiled_part(start, end, dim, base, like.dtype, like.device)
        return cos, sin
    if watched():  # the number of positions may be a symbol
        return _part(start, end, dim, base, like.dtype, like.device)
    cos, sin = _table(_rows(end), dim, base, like.dtype, like.device)
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


class _Rotate(Fused):
    """The rotation is linear and orthogonal: its derivative is the rotation by the opposite angle."""

    linear = True

    @staticmethod
    def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        kept = x.shape[-1] - cos.shape[-1]
        turned = x[..., kept:] if kept else x
        first, second = turned.chunk(2, dim=-1)
        turned = torch.addcmul(turned * cos, torch.cat((-second, first), dim=-1), sin)
        return torch.cat((x[..., :kept], turned), dim=-1) if kept else turned

    @staticmethod
    def fast(_: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
        return (_rotate_into(x, cos, sin),)

    @staticmethod
    def derivative(_: Any, grad: Tensor, inputs: Sequence[Any], kept: Sequence[Tensor]) -> tuple[Tensor, None, None]:
        return _rotate_into(grad, inputs[1], -inputs[2]), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last ``cos.shape[-1]`` coordinates of ``x`` ``(..., dim)``, leave those before them as they are.

    The tables broadcast against ``x``, and may want gradients; the result keeps its dtype. The inverse is
    ``rotate(x, cos, -sin)``.

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
    # Angles that are learned need a derivative of their own, which the plain formula has.
    plain = torch.compiler.is_compiling() or few or cos.requires_grad or sin.requires_grad
    return _Rotate.of(x, cos, sin, by_hand=not plain)


def grid_coordinates(grid: Tensor, scheme: Scheme = "tie", *, start: float = 0.0) -> Tensor:
    r"""Rotary coordinates of a sequence of text and images.

    Text token ``n`` is at ``(n, n)``. An image of ``h`` rows and ``w`` columns behind the text position ``L`` has its
    patch in row ``i`` and column ``j`` (from one) at ``(b1 + i s, b2 + j t)``, and the next text token is at ``K``:

    ============  =====================  ==================  ==================
    scheme        ``s``, ``t``           ``b1 - L, b2 - L``  ``K - L``
    ============  =====================  ==================  ==================
    "tie"         w+1, h+1               0                   (w+1)(h+1)
    "tie-wh"      (wh+1)/(h+1), .../w+1  0                   wh+1
    "tv"          1                      (wh-h)/2, (wh-w)/2  wh+1
    "unscaled"    1                      0                   max(h, w) + 1
    "flat"        patches in row-major order, as text        wh+1
    ============  =====================  ==================  ==================

    RoPE-Tie steps from the text to the first patch as it steps from the last patch to the text; "tie-wh" and RoPE-TV
    let an image be as long as that many tokens. "unscaled" (the M-RoPE of Qwen2-VL) and "flat" are what they are
    compared with. With three axes the same formulas hold, the product over all axes in the place of ``wh``.

    Args:
        grid: ``(..., n, 2 * axes)`` of `text_image_grid`.
        scheme: where patches stand.
        start: position of the first token, were it text.

    Returns:
        float64 ``(..., n, axes)``.

    Raises:
        ValueError: an unknown scheme, or a shape that is no grid.

    Source: kexue.fm 10040 (Tie, and its variant), 10352 (TV).

    >>> grid = text_image_grid([3, (2, 3), 1])
    >>> grid_coordinates(grid, start=1)[3:].int().tolist()
    [[7, 6], [7, 9], [7, 12], [11, 6], [11, 9], [11, 12], [15, 15]]
    """
    choice("scheme", scheme, SCHEMES)
    number("start", start)
    if grid.dim() < 2 or grid.shape[-1] < 2 or grid.shape[-1] % 2:
        raise ValueError(f"grid must be (..., n, 2 * axes), got shape {tuple(grid.shape)}")
    index, size = grid.double().chunk(2, dim=-1)
    if scheme == "flat":
        ones = torch.ones_like(index)
        return ones.cumsum(-2) + (start - 1)
    patches = size.prod(-1, keepdim=True)
    text = patches == 0
    if scheme == "tie":
        length = (size + 1).prod(-1, keepdim=True) - 1
        place = index * (length + 1) / (size + 1)
    elif scheme == "tie-wh":
        length = patches
        place = index * (patches + 1) / (size + 1)
    elif scheme == "tv":
        length = patches
        place = index + (patches - size) / 2
    else:
        length = size.amax(-1, keepdim=True)
        place = index
    # What an image takes is counted at its last patch, so that all of its patches have the same text behind them.
    last = (index == size).all(-1, keepdim=True)
    taken = torch.where(text, 1.0, torch.where(last, length, 0.0))
    before = taken.cumsum(-2) - taken
    return before + torch.where(text, 1.0, place) + (start - 1)


def text_image_coordinates(
    segments: Sequence[int | Sequence[int]], scheme: Scheme = "tie", *, start: float = 0.0
) -> Tensor:
    """Rotary coordinates ``(n, axes)`` of a list of text spans and images; see `text_image_grid`, `grid_coordinates`.

    >>> text_image_coordinates([2, (2, 1), 1]).tolist()
    [[0.0, 0.0], [1.0, 1.0], [3.0, 4.0], [5.0, 4.0], [7.0, 7.0]]
    """
    return grid_coordinates(text_image_grid(segments), scheme, start=start)
