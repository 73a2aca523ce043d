import numpy as np
import pytest
import torch
from PIL import Image

from danlu.report import grid, write_images


def test_images_stand_row_by_row_with_margins_and_small_ones_enlarged():
    shades = torch.tensor([-1.0, 0.0, 1.0, -1.0, 0.0]).view(5, 1, 1, 1).expand(5, 1, 28, 28)
    picture = np.asarray(grid(shades, columns=3))
    assert picture.shape == (2 * 58 + 2, 3 * 58 + 2)
    centres = [[picture[2 + 58 * r + 28, 2 + 58 * c + 28] for c in range(3)] for r in range(2)]
    assert centres == [[0, 128, 255], [0, 128, 255]]  # the last place is empty
    assert (picture[:2] == 255).all()
    colour = torch.stack([torch.full((64, 64), v) for v in (1.0, -1.0, 0.0)])[None]
    assert np.asarray(grid(colour)).shape == (68, 68, 3)
    assert np.asarray(grid(colour))[10, 10].tolist() == [255, 0, 128]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_states_become_frames_the_last_of_which_stays(tmp_path, suffix):
    states = torch.linspace(-1, 1, 4).view(4, 1, 1, 1, 1).expand(4, 2, 1, 28, 28)
    path = write_images(tmp_path / f"way{suffix}", states, seconds=1.5)
    with Image.open(path) as film:
        assert film.n_frames == 4
        film.seek(3)
        assert np.asarray(film.convert("L"))[30, 30] > 250


def test_a_picture_is_written_as_it_is(tmp_path):
    path = write_images(tmp_path / "x.png", torch.zeros(4, 1, 28, 28))
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(grid(torch.zeros(4, 1, 28, 28))))


def test_other_shapes_and_suffixes_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"images must be \(b, 1 or 3, height, width\)"):
        grid(torch.zeros(4, 2, 8, 8))
    with pytest.raises(ValueError, match=r"an animation is written as .gif or .webp, got 'x.png'"):
        write_images(tmp_path / "x.png", torch.zeros(2, 4, 1, 8, 8))
    with pytest.raises(ValueError, match="a picture is written as"):
        write_images(tmp_path / "x.gif", torch.zeros(4, 1, 8, 8))
