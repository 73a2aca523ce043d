r"""DDCM: images as indices into codebooks of noise, by a pretrained diffusion model (Ohayon et al., arXiv 2502.01189).

Ancestral sampling adds :math:`\sigma_t \epsilon` in every step. If :math:`\epsilon` is taken from a fixed codebook of K
codewords instead, the image is determined by the indices: T - 1 numbers of :math:`\log_2 K` bits. How they are chosen
decides what the result is:

* at random: samples of the model (`generate`);
* the codeword whose direction is nearest to the residual :math:`x_0 - \hat x_0(x_t)`: a lossy code of the image
  (`encode`), from which the same steps reproduce it (`decode`);
* the codeword after which a measurement fits best: inpainting, super-resolution (`restore`).

Two corrections of the source (kexue.fm 10711) are built in. Codewords have equal norms: among raw normal codewords the
nearest one is always the shortest, whatever the image. And where an index is drawn at random by weights, the weight is
the density ratio :math:`\exp(m \cdot \epsilon)`: codewords are normal already, and :math:`\exp(-|\epsilon - m|^2 / 2)`,
as in the post, would count their density twice.

Shapes: B images, C channels, H height, W width, D = C H W, K codewords, T steps, M atoms.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from danlu._validate import choice, integer
from danlu.diffusion.codebook import Codebook
from danlu.diffusion.sampler import Denoiser, Progress, posterior, time_grid
from danlu.diffusion.schedule import Schedule

__all__ = ["CodecConfig", "Codes", "decode", "encode", "generate", "restore"]


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Settings of a code; encoder and decoder need the same ones.

    More steps and more codewords lower the distortion. Encoder and decoder evaluate the network once per step.
    """

    steps: int = 100
    """T, the number of steps, each one evaluation of the network"""
    codewords: int = 256
    """K, codewords in a codebook, a power of two"""
    atoms: int = 1
    """M, codewords mixed in each step (matching pursuit)"""
    gain_bits: int = 2
    """C, bits of the weight of each atom after the first; used when there are several atoms"""
    seed: int = 0
    """seed of the codebooks"""
    shared: bool = False
    """use one codebook for all steps, for comparison"""

    def __post_init__(self) -> None:
        integer("steps", self.steps, low=2, high=2**16 - 1)
        integer("codewords", self.codewords, high=2**20)
        if self.codewords & (self.codewords - 1):
            raise ValueError(f"codewords must be a power of two, got {self.codewords}")
        integer("atoms", self.atoms, high=255)
        integer("gain_bits", self.gain_bits, high=8)
        if self.atoms > 1 and self.gain_bits == 1:
            raise ValueError(
                "gain_bits must be at least 2 with several atoms: one bit only says that an atom is absent"
            )
        integer("seed", self.seed, low=0, high=2**64 - 1)

    @property
    def bits(self) -> int:
        """Bits of one image: ``(T - 1) (M log2 K + (M - 1) C)``.

        >>> CodecConfig(steps=1000, codewords=256).bits / 512**2  # bits per pixel of a 512 x 512 image
        0.030487060546875
        """
        index = self.codewords.bit_length() - 1
        return (self.steps - 1) * (self.atoms * index + (self.atoms - 1) * self.gain_bits)


@dataclass(frozen=True)
class Codes:
    """Codes of B images.

    Attributes:
        indices: int64 ``(B, T - 1, M)``, codewords in the order in which they were mixed.
        gains: int64 ``(B, T - 1, M - 1)``, weights of the atoms after the first, 0 to 2^C - 1; an atom of weight 0 and
            all after it are absent.
    """

    indices: Tensor
    gains: Tensor


# Returns the codewords of a step in the images' dtype: all, (K, D), or those of some indices.
_Draw = Callable[..., Tensor]
# Takes a step's number, its codewords, the denoised images, their weight in the mean of the next images and the
# standard deviation of the next images; returns the noise to add.
_Choose = Callable[[int, _Draw, Tensor, Tensor, float], Tensor]


def encode(
    denoise: Denoiser,
    images: Tensor,
    schedule: Schedule,
    config: CodecConfig,
    *,
    rule: Literal["argmax", "posterior"] = "argmax",
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> tuple[Codes, Tensor]:
    """Return the codes of ``images`` and the images that :func:`decode` makes of them.

    Args:
        denoise: ``(x, t) -> x0`` for images ``(B, C, H, W)`` and times ``(B,)``.
        images: ``(B, C, H, W)``, in the range the model was trained on.
        schedule: of the model.
        config: settings of the code.
        rule: ``"argmax"`` takes the codeword with the largest inner product with the residual. ``"posterior"`` draws it
            with weights exp(m . eps), which tends to a sample of the model's posterior as K grows: less faithful,
            livelier textures. It needs ``atoms=1``.
        generator: source of the draws for ``"posterior"``.
        progress: called with the number of steps done and their total.

    Raises:
        ValueError: images of another shape, or several atoms with ``"posterior"``.
    """
    choice("rule", rule, ("argmax", "posterior"))
    if images.ndim != 4:
        raise ValueError(f"images must be (images, channels, height, width), got shape {tuple(images.shape)}")
    if rule == "posterior" and config.atoms > 1:
        raise ValueError(f"rule 'posterior' draws one atom, got atoms={config.atoms}")
    target = images.flatten(1)
    kept: list[tuple[Tensor, Tensor]] = []

    def choose(step: int, draw: _Draw, x0: Tensor, reverse_x0: Tensor, std: float) -> Tensor:
        missing, words = target - x0, draw()
        if rule == "posterior":
            # m = g (x_0 - x0hat) / sigma, with g the weight of x_0 in the mean of the next image.
            scores = (reverse_x0 / std) * (missing @ words.T)
            drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            kept.append((drawn, drawn.new_zeros(len(drawn), 0)))
            return words[drawn[:, 0]]
        indices, gains, noise = _pursue(missing, words, config)
        kept.append((indices, gains))
        return noise

    drawn = _walk(denoise, images.shape, schedule, config, choose, images, progress)
    return Codes(*(torch.stack(parts, dim=1) for parts in zip(*kept, strict=True))), drawn


def decode(
    denoise: Denoiser,
    codes: Codes,
    shape: Sequence[int],
    schedule: Schedule,
    config: CodecConfig,
    *,
    like: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return the images ``(B, C, H, W)`` of codes.

    They equal the encoder's images bit for bit where the network's outputs are bit-identical.

    Args:
        denoise, schedule, config: as in :func:`encode`.
        codes: of B images.
        shape: (C, H, W).
        like: gives dtype and device; None is float32 on the CPU.
        progress: called with the number of steps done and their total.

    Raises:
        ValueError: codes of another number of steps or atoms, or an index outside the codebook.
    """
    count = len(codes.indices)
    expected = (count, config.steps - 1, config.atoms), (count, config.steps - 1, config.atoms - 1)
    if (tuple(codes.indices.shape), tuple(codes.gains.shape)) != expected:
        raise ValueError(f"codes must have the shapes {expected}, got {tuple(codes.indices.shape)}")
    for name, values, end in (
        ("indices", codes.indices, config.codewords),
        ("gains", codes.gains, 1 << config.gain_bits),
    ):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < end:
            raise ValueError(
                f"codes.{name} must be from 0 to {end - 1}, got {int(values.min())} to {int(values.max())}"
            )

    def choose(step: int, draw: _Draw, x0: Tensor, reverse_x0: Tensor, std: float) -> Tensor:
        noise = draw(codes.indices[:, step, 0])
        for atom in range(1, config.atoms):
            noise = _mix(noise, draw(codes.indices[:, step, atom]), codes.gains[:, step, atom - 1], config)
        return noise

    like = torch.empty(0) if like is None else like
    return _walk(denoise, (count, *shape), schedule, config, choose, like, progress)


def generate(
    denoise: Denoiser,
    shape: Sequence[int],
    schedule: Schedule,
    config: CodecConfig,
    *,
    score: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    like: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw images of ``shape`` (B, C, H, W) with codewords in the place of noise.

    Args:
        denoise, schedule, config: as in :func:`encode`; one atom is used.
        shape: (B, C, H, W).
        score: for guidance: a function of the denoised images ``(B, C, H, W)`` that returns the direction in which they
            should change (such as a classifier's gradient of log p(y | x)); the codeword with the largest inner product
            with it is taken. Without it codewords are drawn uniformly.
        generator: source of the drawn indices.
        like: gives dtype and device; None is float32 on the CPU.
        progress: called with the number of steps done and their total.
    """

    def choose(step: int, draw: _Draw, x0: Tensor, reverse_x0: Tensor, std: float) -> Tensor:
        if score is None:
            return draw(torch.randint(config.codewords, (shape[0],), generator=generator, device=x0.device))
        words = draw()
        return words[(score(x0.view(*shape)).flatten(1) @ words.T).argmax(-1)]

    like = torch.empty(0) if like is None else like
    return _walk(denoise, tuple(shape), schedule, config, choose, like, progress)


def restore(
    denoise: Denoiser,
    measured: Tensor,
    measure: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    schedule: Schedule,
    config: CodecConfig,
    *,
    progress: Progress | None = None,
) -> Tensor:
    r"""Draw images whose measurement is ``measured``: inpainting, super-resolution, any linear degradation.

    In every step the codeword is taken after which the measurement fits best,
    :math:`\min_k \| A(\sigma z_k / a + \hat x_0) - y \|^2` with a that of the next image.

    Args:
        denoise, schedule, config: as in :func:`encode`; one atom is used.
        measured: y, ``(B, ...)``.
        measure: A, linear, from images ``(n, C, H, W)`` to ``(n, ...)``: a product with a mask, an average of pixels.
        shape: (C, H, W).
        progress: called with the number of steps done and their total.
    """
    count = len(measured)

    def choose(step: int, draw: _Draw, x0: Tensor, reverse_x0: Tensor, std: float) -> Tensor:
        words, wanted = draw(), (measured - measure(x0.view(count, *shape))).flatten(1)
        seen = measure(words.view(-1, *shape)).flatten(1) * scales[step]
        # |A z|^2 - 2 <A z, y - A x0>, the part of the squared distance that depends on the codeword.
        return words[(seen.square().sum(-1) - 2 * wanted @ seen.T).argmin(-1)]

    levels = _levels(schedule, config)
    scales = [float(posterior(now, then).std / then[0]) for now, then in pairwise(levels)]
    return _walk(denoise, (count, *shape), schedule, config, choose, measured, progress)


def _levels(schedule: Schedule, config: CodecConfig) -> list[tuple[Tensor, Tensor]]:
    """Return a and b at the times of the sampling steps, float64."""
    return [schedule.coefficients(t) for t in time_grid(schedule, config.steps)]


@torch.no_grad()
def _walk(
    denoise: Denoiser,
    shape: Sequence[int],
    schedule: Schedule,
    config: CodecConfig,
    choose: _Choose,
    like: Tensor,
    progress: Progress | None,
) -> Tensor:
    """Ancestral sampling with chosen noise; the last step, to clean data, adds none."""
    times, levels = time_grid(schedule, config.steps), _levels(schedule, config)
    book = Codebook(config.codewords, math.prod(shape[1:]), seed=config.seed, shared=config.shared)
    x = (levels[0][1] * book.start().to(like)).expand(shape[0], -1)
    for step, t in enumerate(times):
        at = t.to(like).expand(shape[0])
        x0 = denoise(x.view(tuple(shape)), at).flatten(1)
        if progress is not None:
            progress(step + 1, len(times))
        if step + 1 < len(times):
            reverse = posterior(levels[step], levels[step + 1])
            noise = choose(step, partial(_words, book, step + 1, like), x0, reverse.x0, float(reverse.std))
            x = reverse.x * x + reverse.x0 * x0 + reverse.std * noise
    return x0.view(tuple(shape))


def _words(book: Codebook, step: int, like: Tensor, indices: Tensor | None = None) -> Tensor:
    return book(step, indices).to(like)


def _pursue(missing: Tensor, words: Tensor, config: CodecConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Matching pursuit: indices ``(B, M)``, gains ``(B, M - 1)`` and the noise ``(B, D)`` they stand for."""
    scores = missing @ words.T
    index = scores.argmax(-1)
    noise = words[index]
    indices, gains = [index], list[Tensor]()
    weights = torch.arange(1, 1 << config.gain_bits, device=words.device) / ((1 << config.gain_bits) - 1)
    stopped = torch.zeros_like(index, dtype=torch.bool)
    for _ in range(1, config.atoms):
        # The inner product of the residual with sqrt(g) noise + sqrt(1 - g) word, rescaled to the codewords' norm.
        reached = (missing * noise).sum(-1)[:, None, None]
        cosine = (noise @ words.T / words.shape[1])[:, :, None]
        root, rest = weights.sqrt(), (1 - weights).sqrt()
        mixed = (root * reached + rest * scores[:, :, None]) / (1 + 2 * root * rest * cosine).sqrt()
        best = mixed.flatten(1).argmax(-1)
        # Weight 1 leaves the noise unchanged: if that is the best choice, no atom improves it, and the row stops.
        index, gain = best // len(weights), best % len(weights) + 1
        stopped = (
            stopped | (gain == len(weights)) | (mixed.flatten(1).gather(1, best[:, None])[:, 0] <= reached[:, 0, 0])
        )
        index, gain = torch.where(stopped, 0, index), torch.where(stopped, 0, gain)
        noise = _mix(noise, words[index], gain, config)
        indices.append(index)
        gains.append(gain)
    empty = index.new_zeros(len(index), 0)
    return torch.stack(indices, 1), torch.stack(gains, 1) if gains else empty, noise


def _mix(noise: Tensor, word: Tensor, gain: Tensor, config: CodecConfig) -> Tensor:
    """Return the noise with an atom mixed in at a gain ``(B,)``, row by row, so that no row's bits depend on others."""
    top = (1 << config.gain_bits) - 1
    rows = []
    for row, atom, number in zip(noise, word, gain.tolist(), strict=True):
        if number:
            mixed = math.sqrt(number / top) * row + math.sqrt(1 - number / top) * atom
            row = mixed * (math.sqrt(len(row)) / torch.linalg.vector_norm(mixed, dtype=torch.float64)).to(row.dtype)
        rows.append(row)
    return torch.stack(rows)
