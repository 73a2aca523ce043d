"""Rotary positions: relative, norm-keeping, right far out; text is one-dimensional beside images, images symmetric."""

import math
from functools import partial

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_most, exact
from danlu.nn.rotary import (
    Layout,
    Scheme,
    rotary_angles,
    rotary_angles_nd,
    rotary_span,
    rotate,
    text_image_coordinates,
    yarn_frequencies,
)


def _sample() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 19, 26, generator=generator, dtype=torch.float64)
    return q, k


def _shift_error(*, both: bool) -> float:
    """Largest change of the score matrix when all positions move by 1000; else those of the queries alone."""
    q, k = _sample()
    scores = []
    for start in (0.0, 1000.0):
        at = torch.arange(19, dtype=torch.float64)
        turned = rotate(q, *rotary_angles(start + at, 26))
        scores.append(turned @ rotate(k, *rotary_angles(start * both + at, 26)).mT)
    return float((scores[0] - scores[1]).abs().max())


def _norm_error(*, with_sine: bool) -> float:
    """Largest relative change of a vector's norm, and distance of the derivative from the opposite rotation."""
    q, _ = _sample()
    cos, sin = rotary_angles(torch.arange(19, dtype=torch.float64), 26)
    sin = sin if with_sine else torch.zeros_like(sin)
    q.requires_grad_()
    turned = rotate(q, cos, sin)
    (back,) = torch.autograd.grad(turned, q, turned.detach())
    q, turned = q.detach(), turned.detach()
    return max(float((turned.norm(dim=-1) / q.norm(dim=-1) - 1).abs().max()), float((back - q).abs().max()))


def _complex(x: Tensor, angles: Tensor, *, halves: bool = True) -> Tensor:
    """The last coordinates turned as complex numbers, of the two halves or (wrongly) of neighbours."""
    pairs = angles.shape[-1]
    kept, turned = x[..., : -2 * pairs], x[..., -2 * pairs :]
    axis = -2 if halves else -1
    first, second = turned.unflatten(-1, (2, pairs) if halves else (pairs, 2)).unbind(axis)
    both = torch.polar(torch.ones_like(angles), angles) * torch.complex(first, second)
    return torch.cat((kept, torch.stack((both.real, both.imag), axis).flatten(-2)), -1)


def _formula_error(*, halves: bool = True) -> float:
    """Largest error of rotations, of a whole vector or a part, small or large, against complex numbers, in float64."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for rows, dim, size in ((7, 12, 8), (5000, 8, 8)):
        x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
        at = torch.arange(3, rows + 3)
        angles = at.double()[:, None] * 500.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        for tables in (
            rotary_angles(at.double(), size, base=500.0),
            rotary_span(3, rows + 3, size, base=500.0, like=x),
        ):
            # The rotation is linear: its derivative along x is the rotation of x.
            along = torch.func.jvp(partial(rotate, cos=tables[0], sin=tables[1]), (x,), (x,))[1]
            for y in (rotate(x, *tables), rotate(x.clone().requires_grad_(), *tables).detach(), along):
                worst = max(worst, float((y - _complex(x, angles, halves=halves)).abs().max()))
    return worst


def _far_error(*, double: bool) -> float:
    """Largest error of the tables at position 1 234 567 against Python's own arithmetic."""
    position, dim = 1_234_567, 64
    angles = [position * 10000.0 ** (-2 * j / dim) for j in range(dim // 2)] * 2
    exact = torch.tensor([[math.cos(a) for a in angles], [math.sin(a) for a in angles]], dtype=torch.float64)
    if double:
        here = torch.cat(rotary_angles(torch.tensor([position]), dim)).double()
    else:
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        turned = (position * frequencies).repeat(2)
        here = torch.stack((turned.cos(), turned.sin())).double()
    return float((here - exact).abs().max())


def _halves_error(*, rows_first: bool) -> float:
    """Largest error of the tables that give the first half of the pairs to the rows, all frequencies to each."""
    at = torch.tensor([[2.0, 5.0], [3.5, -1.0]], dtype=torch.float64)
    found = torch.stack(rotary_angles_nd(at, 24, base=100.0, layout="halves"))
    order = (0, 1) if rows_first else (1, 0)
    turned = [[x[a] * 100.0 ** (-j / 6) for a in order for j in range(6)] * 2 for x in at.tolist()]
    exact = torch.tensor(turned, dtype=torch.float64)
    return float((found - torch.stack((exact.cos(), exact.sin()))).abs().max())


def _text_error(layout: Layout) -> float:
    """Largest difference between the tables of text in the plane and in one dimension."""
    n = torch.arange(1000, dtype=torch.float64)
    pairs = zip(rotary_angles_nd(torch.stack((n, n), dim=-1), 64, layout=layout), rotary_angles(n, 64))
    return max(float((plane - line).abs().max()) for plane, line in pairs)


def _asymmetric(*schemes: Scheme) -> float:
    """Images of up to 19 x 19 patches, over the schemes, whose gap before differs from the gap behind."""
    failures = 0
    for scheme in schemes:
        for h in range(1, 20):
            for w in range(1, 20):
                at = text_image_coordinates([1, (h, w), 1], scheme)
                failures += not torch.allclose(at[1] - at[0], at[-1] - at[-2], rtol=0, atol=1e-12)
    return failures


def _plane_shift_error(*, rotated: bool) -> float:
    """Largest change of the scores of an image's patches when it moves by (100, 50); else with tables added."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 35, 24, generator=generator, dtype=torch.float64)
    scores = []
    for shift in ((0.0, 0.0), (100.0, 50.0)):
        at = text_image_coordinates([(5, 7)]) + torch.tensor(shift, dtype=torch.float64)
        cos, sin = rotary_angles_nd(at, 24)
        if rotated:
            scores.append(rotate(q, cos, sin) @ rotate(k, cos, sin).mT)
        else:
            scores.append((q + cos + sin) @ (k + cos + sin).mT)
    return float((scores[0] - scores[1]).abs().max())


def _listed_error(*, rows_first: bool) -> float:
    """Largest distance from the listed coordinates of three words, 2 x 3 patches, two words, over five schemes."""
    x, y = (16 / 3, 23 / 3), (4.75, 6.5, 8.25)
    listed: dict[Scheme, list[tuple[float, float]]] = {
        "tie": [(7, 6), (7, 9), (7, 12), (11, 6), (11, 9), (11, 12), (15, 15), (16, 16)],
        "tie-wh": [*((a, b) for a in x for b in y), (10, 10), (11, 11)],
        "flat": [(a, a) for a in range(4, 12)],
        "unscaled": [*((a, b) for a in (4, 5) for b in (4, 5, 6)), (7, 7), (8, 8)],
        "tv": [(6, 5.5), (6, 6.5), (6, 7.5), (7, 5.5), (7, 6.5), (7, 7.5), (10, 10), (11, 11)],
    }
    worst = 0.0
    for scheme, points in listed.items():
        at = text_image_coordinates([3, (2, 3), 2], scheme, start=1)[3:]
        at = at if rows_first else at.flip(-1)
        worst = max(worst, float((at - torch.tensor(points, dtype=torch.float64)).abs().max()))
    return worst


def _yarn_error(*, above: int) -> float:
    """Largest relative error of YaRN's frequencies, 64 coordinates, 40 times 4096 tokens; a pair ends the ramp."""
    found = yarn_frequencies(64, 40.0)
    ramp = ((torch.arange(32, dtype=torch.float64) - 10) / (above - 10)).clamp(0, 1)
    plain = 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    return float((found / (plain * (1 - ramp) + plain / 40 * ramp) - 1).abs().max())


CLAIMS = (
    Claim(
        name="yarn",
        statement="error of YaRN's frequencies, 64 coordinates, 40 times 4096 tokens; control: the ramp ends early",
        source="Peng et al., arXiv 2309.00071, with DeepSeek-V2's constants: from pair 10 to 23",
        expected=1e-15,
        tolerance=at_most(),
        measure=lambda: _yarn_error(above=23),
        control=lambda: _yarn_error(above=22),
        seconds=0.1,
    ),
    Claim(
        name="complex-numbers",
        statement="error of rotations of all or the last coordinates against complex numbers; control: neighbours",
        source="RoFormer, arXiv 2104.09864, equation 16, with the pairs (j, j + d/2) of GPT-NeoX",
        expected=4e-15,
        tolerance=at_most(),
        measure=_formula_error,
        control=lambda: _formula_error(halves=False),
        seconds=0.3,
    ),
    Claim(
        name="halves",
        statement="error of tables that turn half of the pairs by the row, half by the column; control: column first",
        source="kexue.fm 8397, section on two dimensions; base^(-4j/d) for each coordinate",
        expected=1e-14,
        tolerance=at_most(),
        measure=lambda: _halves_error(rows_first=True),
        control=lambda: _halves_error(rows_first=False),
        seconds=0.1,
    ),
    Claim(
        name="relative-positions",
        statement="largest change of 19 x 19 scores when positions move by 1000; control: keys not moved",
        source="RoFormer, arXiv 2104.09864, equation 16",
        expected=5e-13,
        tolerance=at_most(),
        measure=lambda: _shift_error(both=True),
        control=lambda: _shift_error(both=False),
        seconds=0.1,
    ),
    Claim(
        name="norm-kept",
        statement="change of norms by the rotation, and of vectors turned back by its derivative; control: no sine",
        source="RoFormer, arXiv 2104.09864, section 3.2.2 (the matrices are orthogonal)",
        expected=4e-15,
        tolerance=at_most(),
        measure=lambda: _norm_error(with_sine=True),
        control=lambda: _norm_error(with_sine=False),
        seconds=0.1,
    ),
    Claim(
        name="far-positions",
        statement="error of float32 tables at position 1 234 567; control: angles multiplied out in float32",
        source="derivation: a float32 angle of 1e6 is rounded by up to 0.03",
        expected=6e-8,
        tolerance=at_most(),
        measure=lambda: _far_error(double=True),
        control=lambda: _far_error(double=False),
        seconds=0.1,
    ),
    Claim(
        name="text-in-the-plane",
        statement="largest difference of tables at (n, n) from one dimension's, n < 1000; control: the halves layout",
        source="kexue.fm 10352; 10040, equations of the degeneration",
        expected=0,
        tolerance=exact(),
        measure=lambda: _text_error("interleaved"),
        control=lambda: _text_error("halves"),
        seconds=0.1,
    ),
    Claim(
        name="images-are-symmetric",
        statement="of 1083 (19 x 19 sizes, Tie, its variant, TV) unequal gaps before and behind; control: no scaling",
        source="kexue.fm 10040, 10352",
        expected=0,
        tolerance=exact(),
        measure=lambda: _asymmetric("tie", "tie-wh", "tv"),
        control=lambda: _asymmetric("unscaled"),
        seconds=0.4,
    ),
    Claim(
        name="relative-in-the-plane",
        statement="change of the scores of 5 x 7 patches moved by (100, 50); control: tables added to the vectors",
        source="kexue.fm 8397, 10040",
        expected=1e-13,
        tolerance=at_most(),
        measure=lambda: _plane_shift_error(rotated=True),
        control=lambda: _plane_shift_error(rotated=False),
        seconds=0.1,
    ),
    Claim(
        name="listed-coordinates",
        statement="distance from the listed coordinates of text around 2 x 3 patches; control: columns before rows",
        source="kexue.fm 10040 and 10352, worked for L = 3",
        expected=1e-14,
        tolerance=at_most(),
        measure=lambda: _listed_error(rows_first=True),
        control=lambda: _listed_error(rows_first=False),
        seconds=0.1,
    ),
)
