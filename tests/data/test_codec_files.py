"""Many images to .ddcm files and back, with a denoiser of closed form."""

import numpy as np
import pytest
import torch
from PIL import Image

from danlu.data.codec_files import decode_files, encode_files
from danlu.diffusion import CodecConfig, Flow

MODEL = bytes(range(16))
CONFIG = CodecConfig(steps=6, codewords=16)


def toward_half(shape):
    """The denoiser of data that are 0.5 everywhere; it checks that it is asked about one image at a time."""

    def denoise(x, t):
        assert x.shape == shape
        assert shape[0] == len(t) == 1
        return 0.5 * x

    return denoise


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def encoded(pictures, out, **changes):
    arguments = {"size": 8, "channels": 1, "model": MODEL} | changes
    return encode_files([str(pictures)], out, toward_half, Flow(), CONFIG, **arguments)


def test_progress_counts_the_steps_and_threads_are_as_before(pictures, tmp_path):
    torch.set_num_threads(2)
    calls = []
    done = encoded(pictures, tmp_path / "codes", progress=lambda *numbers: calls.append(numbers))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert calls == [(2, step + 1, 6) for step in range(6)]
    assert [path.name for path in done.written] == ["a.ddcm", "b.ddcm"]
    assert done.failures == []


def test_decoding_gives_the_encoders_images_and_says_when_it_does_not(pictures, tmp_path):
    written = encoded(pictures, tmp_path / "codes").written
    again = decode_files([str(tmp_path / "codes")], tmp_path / "same", toward_half, Flow(), model=MODEL)
    assert (len(again.written), again.failures, again.differing) == (2, [], 0)

    def other(shape):
        return lambda x, t: 0.4 * x

    differing = decode_files([str(written[0])], tmp_path / "other", other, Flow(), model=MODEL)
    assert (len(differing.written), differing.differing) == (1, 1)


def test_codes_of_another_model_are_named_and_left_out(pictures, tmp_path):
    encoded(pictures, tmp_path / "codes", model=MODEL[::-1])
    done = decode_files([str(tmp_path / "codes")], tmp_path / "out", toward_half, Flow(), model=MODEL)
    assert done.written == []
    assert all("made with another model" in failure for failure in done.failures)
    assert len(done.failures) == 2
    assert list((tmp_path / "out").iterdir()) == []
