"""The codec on a mixture of normal distributions, whose exact denoiser is known; its files, damaged ones included."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.diffusion import (
    Betas,
    Codebook,
    CodecConfig,
    CodecFile,
    Codes,
    Flow,
    decode,
    encode,
    generate,
    image_digest,
    model_digest,
    pack,
    restore,
    unpack,
)
from danlu.diffusion.sampler import posterior, time_grid

D = torch.float64
SCHEDULE = Betas(start=2e-5)
SHAPE = (1, 5, 7)
VARIANCE = 1 / torch.arange(1, 36, dtype=D)
MEANS = torch.randn(3, 35, dtype=D, generator=torch.Generator().manual_seed(5))


def denoise(x, t, schedule=SCHEDULE):
    """``E[x0 | x, t]`` of three normal distributions of falling variances."""
    a, b = (c.view(-1, 1, 1) for c in schedule.coefficients(t))
    y, variance = x.flatten(1)[:, None], a**2 * VARIANCE + b**2
    weight = (-((y - a * MEANS) ** 2) / (2 * variance) - variance.log() / 2).sum(-1).softmax(-1)
    each = MEANS + a * VARIANCE / variance * (y - a * MEANS)
    return (weight[..., None] * each).sum(1).view(x.shape)


def data(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(3, (count,), generator=generator)
    noise = torch.randn(count, 35, dtype=D, generator=generator)
    return (MEANS[which] + VARIANCE.sqrt() * noise).view(count, *SHAPE)


IMAGES = data(24)
GOLDEN = [[1, 3, 5, 4, 4, 3], [0, 1, 6, 5, 6, 3], [1, 0, 5, 1, 4, 6]]
POWER = float(IMAGES.var(0).sum())


def distortion(config, **options):
    drawn = encode(denoise, IMAGES, SCHEDULE, config, **options)[1]
    return float((drawn - IMAGES).square().flatten(1).sum(1).mean()) / POWER


def test_the_distortion_falls_with_the_codewords_and_with_the_steps_and_one_codeword_tells_nothing():
    by_words = [distortion(CodecConfig(steps=40, codewords=k)) for k in (1, 2, 8, 64)]
    assert by_words == sorted(by_words, reverse=True)
    assert by_words[0] > 1
    by_steps = [distortion(CodecConfig(steps=t, codewords=16)) for t in (20, 60, 180)]
    assert by_steps == sorted(by_steps, reverse=True)
    assert by_steps[-1] < 0.05


@pytest.mark.parametrize("config", [CodecConfig(steps=20), CodecConfig(steps=20, codewords=64, atoms=3, gain_bits=2)])
def test_the_decoder_draws_what_the_encoder_drew_to_the_last_bit_alone_or_among_others(config):
    codes, drawn = encode(denoise, IMAGES, SCHEDULE, config)
    assert torch.equal(decode(denoise, codes, SHAPE, SCHEDULE, config, like=IMAGES), drawn)
    one = Codes(codes.indices[3:4], codes.gains[3:4])
    torch.testing.assert_close(decode(denoise, one, SHAPE, SCHEDULE, config, like=IMAGES)[0], drawn[3])
    other = dataclasses.replace(config, seed=1)
    assert float((decode(denoise, codes, SHAPE, SCHEDULE, other, like=IMAGES) - drawn).abs().max()) > 0.5


def test_stored_codes_mean_the_same_images_in_every_release():
    # Encoder and decoder could change together and no round trip would tell: files on disk would.
    indices = encode(denoise, IMAGES[:3], SCHEDULE, CodecConfig(steps=7, codewords=8))[0].indices
    assert indices[:, :, 0].tolist() == GOLDEN


def test_the_first_draw_by_posterior_weights_is_uniform_for_it_knows_nothing_of_the_image():
    same = IMAGES[:1].expand(600, *SHAPE)
    config = CodecConfig(steps=20, codewords=4)
    drawn = encode(denoise, same, SCHEDULE, config, rule="posterior", generator=torch.Generator().manual_seed(0))[
        0
    ].indices[:, 0, 0]
    assert drawn.bincount(minlength=4).tolist() == pytest.approx([150] * 4, abs=4 * (600 * 3 / 16) ** 0.5)


def test_restoring_takes_the_codeword_after_which_the_measurement_fits_best():
    config = CodecConfig(steps=2, codewords=64)
    measured = IMAGES[:5, :, :, :3]
    found = restore(denoise, measured, lambda x: x[..., :3], SHAPE, SCHEDULE, config)
    book = Codebook(64, 35, seed=config.seed)
    (a0, b0), (a1, b1) = (SCHEDULE.coefficients(t) for t in time_grid(SCHEDULE, 2))
    times = time_grid(SCHEDULE, 2)
    x = (b0 * book.start().to(D)).expand(5, -1).view(5, *SHAPE)
    x0 = denoise(x, times[0].expand(5))
    step = posterior((a0, b0), (a1, b1))
    words = book(1).to(D).view(64, *SHAPE)
    for image, wanted, start, clean in zip(found, measured, x, x0, strict=True):
        tried = step.std * words / a1 + clean
        best = (tried[..., :3] - wanted).square().flatten(1).sum(1).argmin()
        noisy = step.x * start + step.x0 * clean + step.std * words[best]
        torch.testing.assert_close(image, denoise(noisy[None], times[1:2])[0], rtol=1e-9, atol=1e-9)


def test_several_atoms_say_more_in_as_many_steps():
    one, four = (CodecConfig(steps=30, codewords=64, atoms=m, gain_bits=3) for m in (1, 4))
    assert distortion(four) < 0.5 * distortion(one)
    assert four.bits == 29 * (4 * 6 + 3 * 3)


def test_an_atom_is_mixed_in_only_where_it_brings_the_noise_nearer():
    codes, _ = encode(denoise, IMAGES, SCHEDULE, CodecConfig(steps=30, codewords=64, atoms=5, gain_bits=2))
    # Where an atom is absent, so are those after it.
    absent = codes.gains == 0
    assert bool((absent.cummax(-1).values == absent).all())


def test_a_codebook_for_all_steps_is_worse_than_one_for_each():
    config = CodecConfig(steps=60, codewords=16)
    assert distortion(config) < 0.6 * distortion(dataclasses.replace(config, shared=True))


def test_the_nearest_codeword_is_the_one_of_the_largest_product_because_norms_are_equal():
    words = Codebook(64, 35)(7).to(D)
    assert torch.allclose(words.norm(dim=1), torch.full((64,), math.sqrt(35), dtype=D), rtol=1e-6)
    wanted = torch.randn(50, 35, dtype=D, generator=torch.Generator().manual_seed(2))
    nearest = torch.cdist(wanted, words).argmin(-1)
    assert torch.equal(nearest, (wanted @ words.T).argmax(-1))


def test_codewords_are_normal_and_independent_between_steps():
    first, second = Codebook(512, 1031)(1), Codebook(512, 1031)(2)
    assert abs(float(first.mean())) < 4 / math.sqrt(first.numel())
    # Scaled to one norm, the fourth moment of a normal distribution becomes 3 d / (d + 2).
    assert float(first.pow(4).mean()) == pytest.approx(3 * 1031 / 1033, abs=4 * math.sqrt(96 / first.numel()))
    inner = (first * second).sum(-1) / math.sqrt(1031)
    assert abs(float(inner.mean())) < 4 / math.sqrt(512)
    assert float(inner.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * 512))
    # The gain of choosing: the mean of the largest of K normal numbers, 2.82 for K = 256 (measured).
    gains = torch.stack([Codebook(256, 101, seed=s)(1)[:, 0].max() for s in range(200)])
    assert float(gains.mean()) == pytest.approx(2.82, abs=0.12)


def test_codewords_are_the_same_in_another_process_with_other_threads():
    script = "import hashlib, torch; torch.set_num_threads(2); from danlu.diffusion.codebook import Codebook; "
    script += "print(hashlib.sha256(Codebook(16, 37, seed=9)(3).numpy().tobytes()).hexdigest()[:16])"
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert there == "a05c7b7c55e57ac4"


@pytest.mark.parametrize(("codewords", "dim"), [(99, 3), (640, 784), (41, 30001)])
def test_codewords_drawn_alone_are_those_of_the_complete_codebook(codewords, dim):
    book = Codebook(codewords, dim, seed=3)
    indices = torch.tensor([codewords - 1, 0, 5, 5])
    assert torch.equal(book(2, indices), book(2)[indices])


def test_drawing_by_the_posterior_weights_tends_to_the_posterior_and_not_to_the_nearest():
    config = CodecConfig(steps=40, codewords=256)
    drawn = distortion(config, rule="posterior", generator=torch.Generator().manual_seed(0))
    assert distortion(config) < drawn < 1


def test_codewords_drawn_at_random_give_samples_of_the_model():
    config = CodecConfig(steps=60, codewords=64)
    generator = torch.Generator().manual_seed(1)
    drawn = generate(denoise, (400, *SHAPE), SCHEDULE, config, generator=generator, like=IMAGES).flatten(1)
    nearest = torch.cdist(drawn, MEANS).argmin(-1).bincount(minlength=3) / 400
    assert float(nearest.min()) > 0.2
    assert float(drawn.var(0).sum()) == pytest.approx(float(data(400, 3).flatten(1).var(0).sum()), rel=0.2)


def test_a_score_guides_towards_its_class():
    config = CodecConfig(steps=40, codewords=64)

    def drawn(score):
        generator = torch.Generator().manual_seed(0)
        return generate(denoise, (40, *SHAPE), SCHEDULE, config, score=score, generator=generator, like=IMAGES)

    def nearest(images):
        return torch.cdist(images.flatten(1), MEANS).argmin(-1)

    towards = drawn(lambda x0: MEANS[1].view(1, *SHAPE) - x0)
    assert float((nearest(towards) == 1).double().mean()) > 0.95
    assert float((nearest(drawn(None)) == 1).double().mean()) < 0.8


@pytest.mark.parametrize(
    "measure",
    [lambda x: x[..., ::2, :], lambda x: torch.nn.functional.avg_pool2d(x, (5, 1))],
    ids=["inpaint", "average"],
)
def test_restoring_fits_the_measurement_better_than_a_sample_does(measure):
    config = CodecConfig(steps=80, codewords=256)
    measured = measure(IMAGES)
    restored = restore(denoise, measured, measure, SHAPE, SCHEDULE, config)
    free = generate(denoise, IMAGES.shape, SCHEDULE, config, like=IMAGES, generator=torch.Generator().manual_seed(0))
    assert float((measure(restored) - measured).square().mean()) < 0.1 * float(
        (measure(free) - measured).square().mean()
    )
    assert float((restored - IMAGES).square().mean()) < 0.7 * float((free - IMAGES).square().mean())


def test_a_flow_model_codes_too():
    config = CodecConfig(steps=60, codewords=64)
    drawn = encode(lambda x, t: denoise(x, t, Flow()), IMAGES, Flow(), config)[1]
    assert float((drawn - IMAGES).square().flatten(1).sum(1).mean()) / POWER < 0.2


@st.composite
def files(draw):
    config = CodecConfig(
        steps=draw(st.integers(2, 40)),
        codewords=2 ** draw(st.integers(0, 12)),
        atoms=draw(st.integers(1, 4)),
        gain_bits=draw(st.integers(2, 8)),
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = (1, config.steps - 1)
    indices = torch.randint(config.codewords, (*size, config.atoms), generator=generator)
    gains = torch.randint(1 << config.gain_bits, (*size, config.atoms - 1), generator=generator)
    shape = tuple(draw(st.integers(1, 65535)) for _ in range(3))
    return CodecFile(Codes(indices, gains), config, shape, draw(st.binary(min_size=16, max_size=16)), bytes(8))


@given(file=files())
def test_a_file_holds_its_code_in_as_many_bits_as_the_formula_says(file):
    packed = pack(file)
    assert len(packed) == 52 + math.ceil(file.config.bits / 8)
    read = unpack(packed)
    assert torch.equal(read.codes.indices, file.codes.indices)
    assert torch.equal(read.codes.gains, file.codes.gains)
    assert (read.config, read.shape, read.model, read.image) == (file.config, file.shape, file.model, file.image)


@given(file=files(), where=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.integers(1, 200))
def test_a_file_with_a_bit_changed_or_cut_short_is_rejected(file, where, bit, cut):
    packed = bytearray(pack(file))
    packed[where % len(packed)] ^= 1 << bit
    with pytest.raises(ValueError, match=r"damaged|cut short|not a \.ddcm|version"):
        unpack(bytes(packed))
    with pytest.raises(ValueError, match=r"cut short|not a \.ddcm"):
        unpack(pack(file)[:-cut])


@given(junk=st.binary(max_size=300))
def test_any_other_bytes_are_rejected(junk):
    with pytest.raises(ValueError, match=r"damaged|cut short|not a \.ddcm|version"):
        unpack(b"DDCM" + junk)
    with pytest.raises(ValueError, match=r"not a \.ddcm"):
        unpack(b"x" + junk)


def test_digests_change_with_a_weight_and_with_a_pixel():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    assert model_digest(state) == model_digest(dict(reversed(list(state.items()))))
    assert model_digest({**state, "b": torch.full((1,), 1.0000001)}) != model_digest(state)
    pixels = torch.zeros(1, 2, 2, dtype=torch.uint8)
    assert image_digest(pixels) != image_digest(pixels + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CodecConfig(codewords=12), "codewords must be a power of two, got 12"),
        (lambda: CodecConfig(atoms=2, gain_bits=1), "gain_bits must be at least 2 with several atoms"),
        (lambda: CodecConfig(steps=1), "steps"),
        (lambda: Codebook(0, 3), "codewords"),
        (lambda: Codebook(99, 3)(1, torch.tensor([4, 99])), "indices must be from 0 to 98, got 4 to 99"),
        (lambda: encode(denoise, IMAGES[0], SCHEDULE, CodecConfig()), "images must be"),
        (lambda: encode(denoise, IMAGES, SCHEDULE, CodecConfig(), rule="nearest"), "rule"),
        (lambda: encode(denoise, IMAGES, SCHEDULE, CodecConfig(atoms=2), rule="posterior"), "draws one atom"),
        (
            lambda: decode(
                denoise,
                Codes(torch.full((1, 1, 1), 9), torch.zeros(1, 1, 0, dtype=torch.int64)),
                SHAPE,
                SCHEDULE,
                CodecConfig(steps=2, codewords=8),
            ),
            "indices must be from 0 to 7, got 9",
        ),
        (
            lambda: decode(denoise, Codes(torch.zeros(1, 2, 1), torch.zeros(1, 2, 0)), SHAPE, SCHEDULE, CodecConfig()),
            "codes must have the shapes",
        ),
    ],
)
def test_bad_input_raises_an_error_that_names_it(make, message):
    with pytest.raises(ValueError, match=message):
        make()
