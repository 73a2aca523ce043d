"""The codec of a diffusion model: distortion by bits, equal norms, the right weights, files that decode exactly."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_least, at_most, exact, relative
from danlu.diffusion import Betas, Codebook, CodecConfig, decode, encode

_SCHEDULE = Betas(start=2e-5)
_SIZE = 64
_VARIANCE = 1 / torch.arange(1, _SIZE + 1, dtype=torch.float64)


def _means() -> Tensor:
    return torch.randn(3, _SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def _denoise(x: Tensor, t: Tensor) -> Tensor:
    """``E[x0 | x, t]`` of a mixture of three normal distributions of falling variances."""
    a, b = (c.view(-1, 1, 1) for c in _SCHEDULE.coefficients(t))
    means, y, variance = _means(), x.flatten(1)[:, None], a**2 * _VARIANCE + b**2
    weight = (-((y - a * means) ** 2) / (2 * variance) - variance.log() / 2).sum(-1).softmax(-1)
    each = means + a * _VARIANCE / variance * (y - a * means)
    return (weight[..., None] * each).sum(1).view(x.shape)


def _data(count: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(3, (count,), generator=generator)
    noise = torch.randn(count, _SIZE, dtype=torch.float64, generator=generator)
    return (_means()[which] + _VARIANCE.sqrt() * noise).view(count, 1, 8, 8)


def _distortion(config: CodecConfig) -> float:
    """Mean square error of the decoded images over the variance of the data."""
    images = _data()
    drawn = encode(_denoise, images, _SCHEDULE, config)[1]
    return float((drawn - images).square().flatten(1).sum(1).mean() / images.var(0).sum())


def _nearest_is_largest(*, raw: bool, size: int = 4096, codewords: int = 256) -> float:
    """Share of 100 directions of length 1 for which the nearest codeword is the one of the largest inner product."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randn(codewords, size, generator=generator) if raw else Codebook(codewords, size)(1)
    wanted = torch.nn.functional.normalize(torch.randn(100, size, generator=generator), dim=-1)
    # |m - c|^2 - |m|^2, in float64: the differences are a millionth of the squares.
    products = wanted.double() @ words.double().T
    nearest = (words.double().square().sum(-1) - 2 * products).argmin(-1)
    return float((nearest == products.argmax(-1)).double().mean())


def _weighted_mean(*, ratio: bool, m: float = 0.8, count: int = 2_000_000) -> float:
    """Mean of normal draws weighted by exp(m eps), or by the post's exp(-(eps - m)^2 / 2)."""
    eps = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = (m * eps if ratio else -((eps - m) ** 2) / 2).softmax(0)
    return float((weights * eps).sum())


def _gain(codewords: int) -> float:
    """Mean over 300 codebooks of the largest of K normal numbers."""
    largest = [Codebook(codewords, 101, seed=seed)(1)[:, 0].max() for seed in range(300)]
    return float(torch.stack(largest).mean())


def _round_trip(*, same: bool) -> float:
    """Largest difference between what the encoder and the decoder draw; the control changes the codebooks' seed."""
    config, images = CodecConfig(steps=40, codewords=64, atoms=3, gain_bits=3), _data(8)
    codes, drawn = encode(_denoise, images, _SCHEDULE, config)
    other = config if same else replace(config, seed=1)
    again = decode(_denoise, codes, (1, 8, 8), _SCHEDULE, other, like=images)
    return float((again - drawn).abs().max())


_WORDS = CodecConfig(steps=100, codewords=64)

CLAIMS = (
    Claim(
        name="round-trip",
        statement="largest difference between the encoder's and the decoder's image; control: another seed",
        source="derivation: the same walk",
        expected=0,
        tolerance=exact(),
        measure=lambda: _round_trip(same=True),
        control=lambda: _round_trip(same=False),
        seconds=0.5,
    ),
    Claim(
        name="words-for-steps",
        statement="distortion at T = 100, K = 64 over that at T = 100, K = 4; control: K = 2 over K = 4",
        source="own measurement: .034 / .098 at T = 50, .0094 / .042 at T = 200",
        expected=0.35,
        tolerance=at_most(),
        measure=lambda: _distortion(_WORDS) / _distortion(replace(_WORDS, codewords=4)),
        control=lambda: _distortion(replace(_WORDS, codewords=2)) / _distortion(replace(_WORDS, codewords=4)),
        seconds=1.0,
    ),
    Claim(
        name="no-information",
        statement="distortion with one codeword; control: two",
        source="own measurement: 1.8 to 2.3",
        expected=1,
        tolerance=at_least(),
        measure=lambda: _distortion(replace(_WORDS, codewords=1)),
        control=lambda: _distortion(replace(_WORDS, codewords=2)),
        seconds=0.6,
    ),
    Claim(
        name="own-codebooks",
        statement="distortion with a codebook a step over that with one for all; control: the other way round",
        source="own measurement: .0082 / .058 at T = 200, K = 64",
        expected=0.6,
        tolerance=at_most(),
        measure=lambda: _distortion(_WORDS) / _distortion(replace(_WORDS, shared=True)),
        control=lambda: _distortion(replace(_WORDS, shared=True)) / _distortion(_WORDS),
        seconds=1.0,
    ),
    Claim(
        name="equal-norms",
        statement="share of cases in which the nearest codeword is the best one, D = 4096; control: raw codewords",
        source="own measurement: 0 of 200 with raw normal codewords",
        expected=1,
        tolerance=exact(),
        measure=lambda: _nearest_is_largest(raw=False),
        control=lambda: _nearest_is_largest(raw=True),
        seconds=0.3,
    ),
    Claim(
        name="weights",
        statement="mean of normal draws weighted for the mean 0.8; control: the post's weights",
        source="derivation: exp(m eps) is the density ratio; the post's give 0.4",
        expected=0.8,
        tolerance=absolute(0.01),
        measure=lambda: _weighted_mean(ratio=True),
        control=lambda: _weighted_mean(ratio=False),
        seconds=0.3,
    ),
    Claim(
        name="gain",
        statement="mean largest of K = 256 codewords along a direction; control: K = 16",
        source="own measurement: 2.82",
        expected=2.82,
        tolerance=relative(0.04),
        measure=lambda: _gain(256),
        control=lambda: _gain(16),
        seconds=0.8,
    ),
    Claim(
        name="bits",
        statement="bits per pixel at 512 x 512, T = 1000, K = 256; control: T indices instead of T - 1",
        source="arXiv 2502.01189: (T - 1) log2 K / (H W) = .0305",
        expected=999 * 8 / 512**2,
        tolerance=exact(),
        measure=lambda: CodecConfig(steps=1000, codewords=256).bits / 512**2,
        control=lambda: 1000 * math.log2(256) / 512**2,
        seconds=0.1,
    ),
)
