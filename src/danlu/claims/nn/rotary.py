"""Rotary positions: relative, norm-keeping, right far out; text is one-dimensional beside images, images symmetric."""

import math

import torch
from torch import Tensor

from danlu.claims.frame import Claim, at_most, exact
from danlu.nn.rotary import Layout, Scheme, rotary_angles, rotary_angles_nd, rotate, text_image_coordinates


def _sample() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 19, 26, generator=generator, dtype=torch.float64)
    return q, k


def _shift_error(*, rotated: bool) -> float:
    """Largest change of the score matrix when all positions move by 1000; else with tables added instead."""
    q, k = _sample()
    scores = []
    for start in (0.0, 1000.0):
        cos, sin = rotary_angles(start + torch.arange(19, dtype=torch.float64), 26)
        if rotated:
            scores.append(rotate(q, cos, sin) @ rotate(k, cos, sin).mT)
        else:
            scores.append((q + cos + sin) @ (k + cos + sin).mT)
    return float((scores[0] - scores[1]).abs().max())


def _norm_error(*, with_sine: bool) -> float:
    """Largest relative change of a vector's norm."""
    q, _ = _sample()
    cos, sin = rotary_angles(torch.arange(19, dtype=torch.float64), 26)
    turned = rotate(q, cos, sin if with_sine else torch.zeros_like(sin))
    return float((turned.norm(dim=-1) / q.norm(dim=-1) - 1).abs().max())


def _far_error(*, double: bool) -> float:
    """Largest error of the cosines at position 1 234 567 against Python's own arithmetic."""
    position, dim = 1_234_567, 64
    exact = [math.cos(position * 10000.0 ** (-2 * j / dim)) for j in range(dim // 2)]
    if double:
        here = rotary_angles(torch.tensor([position]), dim)[0][0, : dim // 2].double()
    else:
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        here = (position * frequencies).cos().double()
    return float((here - torch.tensor(exact, dtype=torch.float64)).abs().max())


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
    """Largest distance from the listed coordinates of three words, 2 x 3 patches, two words, over three schemes."""
    x, y = (16 / 3, 23 / 3), (4.75, 6.5, 8.25)
    listed: dict[Scheme, list[tuple[float, float]]] = {
        "tie": [(7, 6), (7, 9), (7, 12), (11, 6), (11, 9), (11, 12), (15, 15), (16, 16)],
        "tie-wh": [*((a, b) for a in x for b in y), (10, 10), (11, 11)],
        "tv": [(6, 5.5), (6, 6.5), (6, 7.5), (7, 5.5), (7, 6.5), (7, 7.5), (10, 10), (11, 11)],
    }
    worst = 0.0
    for scheme, points in listed.items():
        at = text_image_coordinates([3, (2, 3), 2], scheme, start=1)[3:]
        at = at if rows_first else at.flip(-1)
        worst = max(worst, float((at - torch.tensor(points, dtype=torch.float64)).abs().max()))
    return worst


CLAIMS = (
    Claim(
        name="relative-positions",
        statement="largest change of 19 x 19 scores when positions move by 1000; control: tables added to the vectors",
        source="RoFormer, arXiv 2104.09864, equation 16",
        expected=1e-11,
        tolerance=at_most(),
        measure=lambda: _shift_error(rotated=True),
        control=lambda: _shift_error(rotated=False),
        seconds=0.1,
    ),
    Claim(
        name="norm-kept",
        statement="largest relative change of a norm by the rotation; control: without the sine part",
        source="RoFormer, arXiv 2104.09864, section 3.2.2 (the matrices are orthogonal)",
        expected=1e-14,
        tolerance=at_most(),
        measure=lambda: _norm_error(with_sine=True),
        control=lambda: _norm_error(with_sine=False),
        seconds=0.1,
    ),
    Claim(
        name="far-positions",
        statement="error of float32 tables at position 1 234 567; control: angles multiplied out in float32",
        source="derivation: a float32 angle of 1e6 is rounded by up to 0.03",
        expected=1e-6,
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
        seconds=0.8,
    ),
    Claim(
        name="relative-in-the-plane",
        statement="change of the scores of 5 x 7 patches moved by (100, 50); control: tables added to the vectors",
        source="kexue.fm 8397, 10040",
        expected=1e-12,
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
