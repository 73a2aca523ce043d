"""The codec of a diffusion model: its walk written out, distortion by bits, equal norms, the right weights, files."""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_least, at_most, exact, relative
from danlu.diffusion import Betas, Codebook, CodecConfig, Codes, decode, encode, restore
from danlu.diffusion.codec_file import CodecFile, pack, unpack

_SCHEDULE = Betas(start=2e-5)
_SIZE = 64
_VARIANCE = 1 / torch.arange(1, _SIZE + 1, dtype=torch.float64)

# A step's number, the noise level's factor, its codewords and the denoised images: the codeword of each image.
_Choice = Callable[[int, float, Tensor, Tensor], Tensor]


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


@lru_cache(maxsize=16)
def _distortion(codewords: int, *, shared: bool = False, steps: int = 200) -> float:
    """Mean square error of the decoded images over the variance of the data."""
    images = _data()
    config = CodecConfig(steps=steps, codewords=codewords, shared=shared)
    drawn = encode(_denoise, images, _SCHEDULE, config)[1]
    return float((drawn - images).square().flatten(1).sum(1).mean() / images.var(0).sum())


def _alphas(steps: int) -> Tensor:
    """The products of the signal's factors at the steps' times, from the thousand betas; ends with 1 for clean data."""
    kept = (1 - torch.linspace(2e-5, 0.02, 1000, dtype=torch.float64)).cumprod(0).sqrt()
    return torch.cat((kept[1000 // steps - 1 :: 1000 // steps].flip(0), torch.ones(1, dtype=torch.float64)))


def _written_out(config: CodecConfig, count: int, choose: _Choice, *, wide: bool = False) -> Tensor:
    """Ancestral sampling with chosen codewords by the source's formulas; ``wide`` adds noise of size beta_t."""
    book, kept = Codebook(config.codewords, _SIZE, seed=config.seed), _alphas(config.steps)
    x = ((1 - kept[0] ** 2).sqrt() * book.start().double()).expand(count, -1)
    x0 = x
    for step, (a, a_next) in enumerate(pairwise(kept)):
        t = torch.full((count,), 1 - step / config.steps, dtype=torch.float64)
        x0 = _denoise(x.view(count, 1, 8, 8), t).flatten(1)
        if step + 1 == config.steps:
            break
        alpha, b, b_next = a / a_next, (1 - a**2).sqrt(), (1 - a_next**2).sqrt()
        beta = (1 - alpha**2).sqrt()
        std = beta if wide else beta * b_next / b
        noise = choose(step + 1, float(std / a_next), book(step + 1).double(), x0)
        x = alpha * b_next**2 / b**2 * x + a_next * beta**2 / b**2 * x0 + std * noise
    return x0.view(count, 1, 8, 8)


def _encoding_error(*, wide: bool) -> float:
    """Largest distance of the encoder's images from the formulas', whose codeword is the nearest one."""
    config, images = CodecConfig(steps=40, codewords=64), _data(8)
    target = images.flatten(1)

    def nearest(step: int, scale: float, words: Tensor, x0: Tensor) -> Tensor:
        return words[torch.cdist(target - x0, words).argmin(-1)]

    drawn = encode(_denoise, images, _SCHEDULE, config)[1]
    return float((drawn - _written_out(config, 8, nearest, wide=wide)).abs().max())


def _restoration_error(*, scaled: bool) -> float:
    """The same of images restored from averages of 2 x 2 pixels; every codeword is tried."""
    config, images = CodecConfig(steps=40, codewords=64), _data(8)

    def average(x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 2)

    wanted = average(images)

    def fitting(step: int, scale: float, words: Tensor, x0: Tensor) -> Tensor:
        # The control leaves out that the next images hold a part of the data only.
        size = scale if scaled else scale * float(_alphas(config.steps)[step])
        tried = (size * words[:, None] + x0).view(-1, 1, 8, 8)
        misses = (average(tried).view(len(words), len(x0), -1) - wanted.flatten(1)).square().sum(-1)
        return words[misses.argmin(0)]

    drawn = restore(_denoise, wanted, average, (1, 8, 8), _SCHEDULE, config)
    return float((drawn - _written_out(config, 8, fitting)).abs().max())


def _nearest_is_largest(*, raw: bool, size: int = 4096, codewords: int = 256) -> float:
    """Share of 100 directions of length 1 for which the nearest codeword is the one of the largest inner product."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randn(codewords, size, generator=generator) if raw else Codebook(codewords, size)(1)
    wanted = torch.nn.functional.normalize(torch.randn(100, size, generator=generator), dim=-1)
    # |m - c|^2 - |m|^2, in float64: the differences are a millionth of the squares.
    products = wanted.double() @ words.double().T
    nearest = (words.double().square().sum(-1) - 2 * products).argmin(-1)
    return float((nearest == products.argmax(-1)).double().mean())


def _codeword_error(stream: int) -> float:
    """Largest distance of step 2's codewords from normal quantiles of the 16-bit numbers of a stream, over its norm."""
    bits = np.random.Philox(key=3, counter=[0, stream, 0, 0]).random_raw(60).astype("<u8").view("<u2")
    middle = NormalDist()
    normal = torch.tensor([middle.inv_cdf((int(i) + 0.5) / 2**16) for i in bits], dtype=torch.float64).view(8, 30)
    expected = normal * (30**0.5 / normal.norm(dim=1, keepdim=True))
    rows = torch.tensor([5])  # one alone is drawn on its own
    words = Codebook(8, 30, seed=3)
    found = (words(2), words(2, torch.arange(8)), torch.cat((expected[:5].float(), Codebook(64, 30, seed=3)(2, rows))))
    return max(float((these - expected[: len(these)]).abs().max()) for these in found)


def _weighted_mean(*, part: bool, count: int = 20_000) -> float:
    """Mean along m, over its length, of codewords drawn with weights exp(m eps), for an m of length 0.8.

    Two steps: in the one that draws, x_0 is found to be zero, and the images are such that m is what was asked for.
    The control forgets which part of the next images' mean x_0 has.
    """
    config = CodecConfig(steps=2, codewords=64)
    a, a_next = _alphas(2)[:2].tolist()
    alpha, b2, b2_next = a / a_next, 1 - a**2, 1 - a_next**2
    std = math.sqrt((1 - alpha**2) * b2_next / b2)
    weight = a_next * (1 - alpha**2) / b2 if part else 1.0
    direction = torch.zeros(_SIZE, dtype=torch.float64)
    direction[3] = 1.0
    images = (0.8 * std / weight * direction).expand(count, -1).reshape(count, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    codes, _ = encode(lambda x, t: 0 * x, images, _SCHEDULE, config, rule="posterior", generator=generator)
    words = Codebook(64, _SIZE)(1).double() @ direction
    share = (0.8 * words).softmax(0)
    found = words[codes.indices.flatten()].mean()
    return float((found - share @ words) / ((share @ words.square() - (share @ words) ** 2) / count).sqrt())


def _gain(codewords: int) -> float:
    """Mean over 300 codebooks of the largest of K normal numbers."""
    largest = [Codebook(codewords, 101, seed=seed)(1)[:, 0].max() for seed in range(300)]
    return float(torch.stack(largest).mean())


def _pursued(atoms: int) -> float:
    """Mean inner product of 64 directions with the noise that is pursued for them, 256 codewords of 4096 numbers."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.nn.functional.normalize(torch.randn(64, 4096, generator=generator), dim=-1).view(64, 1, 64, 64)
    config = CodecConfig(steps=2, codewords=256, atoms=atoms, gain_bits=2)
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return 0 * x

    encode(denoise, wanted, _SCHEDULE, config)
    a, a_next = _alphas(2)[:2].tolist()
    alpha, b2, b2_next = a / a_next, 1 - a**2, 1 - a_next**2
    noise = (seen[1] - alpha * b2_next / b2 * seen[0]) / math.sqrt((1 - alpha**2) * b2_next / b2)
    return float((noise * wanted).flatten(1).sum(1).mean())


def _round_trip(*, same: bool) -> float:
    """Largest difference between the encoder's images and those of its files; the control swaps two first indices."""
    config, images = CodecConfig(steps=40, codewords=64, atoms=3, gain_bits=3, seed=7), _data(8)
    codes, drawn = encode(_denoise, images, _SCHEDULE, config)
    worst = 0.0
    for index, image in enumerate(drawn):
        own = Codes(codes.indices[index : index + 1], codes.gains[index : index + 1])
        data = unpack(pack(CodecFile(own, config, (1, 8, 8), bytes(16), bytes(8))))
        read = data.codes.indices if same else torch.cat((data.codes.indices[:, [1, 0]], data.codes.indices[:, 2:]), 1)
        again = decode(_denoise, Codes(read, data.codes.gains), data.shape, _SCHEDULE, data.config, like=images)
        worst = max(worst, float((again[0] - image).abs().max()))
    return worst


CLAIMS = (
    Claim(
        name="round-trip",
        statement="largest difference of the encoder's images from those of their files; control: two indices swapped",
        source="derivation: the same walk",
        expected=0,
        tolerance=exact(),
        measure=lambda: _round_trip(same=True),
        control=lambda: _round_trip(same=False),
        seconds=0.8,
    ),
    Claim(
        name="written-out",
        statement="distance of encoded images from the formulas', nearest codewords, T = 40; control: noise of beta_t",
        source="kexue.fm 10711; arXiv 2502.01189, with the posterior's standard deviation",
        expected=1e-13,
        tolerance=at_most(),
        measure=lambda: _encoding_error(wide=False),
        control=lambda: _encoding_error(wide=True),
        seconds=0.2,
    ),
    Claim(
        name="restored",
        statement="the same of images restored from averages, all codewords tried; control: the noise not over a",
        source="arXiv 2502.01189, official code: argmin |A(sigma z / a + x0) - y|^2, a that of the next images",
        expected=1e-13,
        tolerance=at_most(),
        measure=lambda: _restoration_error(scaled=True),
        control=lambda: _restoration_error(scaled=False),
        seconds=0.2,
    ),
    Claim(
        name="words-for-steps",
        statement="distortion at T = 200, K = 64 over that at T = 200, K = 4; control: K = 32 over K = 4",
        source="own measurement: .0094 / .042 with raw codewords; .19 with codewords of one norm",
        expected=0.19,
        tolerance=relative(0.05),
        measure=lambda: _distortion(64) / _distortion(4),
        control=lambda: _distortion(32) / _distortion(4),
        seconds=0.6,
    ),
    Claim(
        name="no-information",
        statement="distortion with one codeword; control: two",
        source="derivation: another sample of the model is further away than the mean; own measurement: 1.8 to 2.3",
        expected=1.8,
        tolerance=at_least(),
        measure=lambda: _distortion(1),
        control=lambda: _distortion(2),
        seconds=0.4,
    ),
    Claim(
        name="own-codebooks",
        statement="distortion with a codebook a step, T = 200, K = 64; control: one codebook for all steps",
        source="own measurement: .0082, .058 with one for all",
        expected=0.0082,
        tolerance=at_most(),
        measure=lambda: _distortion(64),
        control=lambda: _distortion(64, shared=True),
        seconds=0.4,
    ),
    Claim(
        name="equal-norms",
        statement="share of cases in which the nearest codeword is the best one, D = 4096; control: raw codewords",
        source="own measurement: 0 of 200 with raw normal codewords",
        expected=1,
        tolerance=exact(),
        measure=lambda: _nearest_is_largest(raw=False),
        control=lambda: _nearest_is_largest(raw=True),
        seconds=0.1,
    ),
    Claim(
        name="codewords",
        statement="distance of codewords from normal quantiles of a step's 16-bit numbers; control: the step before",
        source="derivation: quantiles are rounded to 2^-12, before the norm is set",
        expected=2**-12,
        tolerance=at_most(),
        measure=lambda: _codeword_error(2),
        control=lambda: _codeword_error(1),
        seconds=0.1,
    ),
    Claim(
        name="weights",
        statement="error of the mean of codewords drawn for |m| = 0.8, in standard errors; control: m not scaled",
        source="derivation: exp(m eps) is the density ratio, m = a beta^2 / b^2 (x0 - x0hat) / sigma",
        expected=0,
        tolerance=absolute(2.5),
        measure=lambda: _weighted_mean(part=True),
        control=lambda: _weighted_mean(part=False),
        seconds=0.3,
    ),
    Claim(
        name="gain",
        statement="mean largest of K = 256 codewords along a direction; control: K = 128",
        source="derivation: the largest of 256 normal numbers; own measurement: 2.82",
        expected=2.82,
        tolerance=relative(0.02),
        measure=lambda: _gain(256),
        control=lambda: _gain(128),
        seconds=0.2,
    ),
    Claim(
        name="pursuit",
        statement="inner product of a direction with the mixture of four atoms, K = 256, C = 2; control: three atoms",
        source="derivation: half the sum of the four largest of 256 normal numbers",
        expected=4.81,
        tolerance=relative(0.01),
        measure=lambda: _pursued(4),
        control=lambda: _pursued(3),
        seconds=0.2,
    ),
    Claim(
        name="bits",
        statement="bits at T = 1000, K = 256, four atoms of two bits; control: a weight for the first atom too",
        source="arXiv 2502.01189: (T - 1) (M log2 K + (M - 1) C)",
        expected=999 * (4 * 8 + 3 * 2),
        tolerance=exact(),
        measure=lambda: CodecConfig(steps=1000, codewords=256, atoms=4, gain_bits=2).bits,
        control=lambda: 999 * 4 * (8 + 2),
        seconds=0.1,
    ),
)
