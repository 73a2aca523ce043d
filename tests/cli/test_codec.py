"""`danlu encode` and `danlu decode`: there and back, exactly, with bad files named and left out."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from danlu.cli import main

SMALL = ["--steps", "6", "--codewords", "16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("the extra [images] (scikit-learn) is not installed")
    folder = tmp_path_factory.mktemp("runs") / "flow"
    options = "--train.steps 3 --train.eval_every 3 --train.threads 1 --train.tensorboard False --train.device cpu "
    options += "--data.batch 20 --data.source digits8 --model.condition 8 --model.num_heads 2 --model.widths 8 12 "
    options += "--model.blocks 1 1 --schedule.warmup 1"
    assert main(["train", "digits-flow", "--out", str(folder), *options.split()]) == 0
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "d.png").write_bytes(b"no image")
    return folder


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_images_go_there_and_back_alone_or_together_whatever_the_threads_and_bad_ones_are_named(
    run, pictures, tmp_path, capsys
):
    codes, back, alone = (tmp_path / name for name in ("codes", "back", "alone"))
    assert main(["encode", str(run), str(pictures), "--out", str(codes), *SMALL]) == 1
    said = capsys.readouterr()
    assert "3 images in" in said.out
    assert "20 bits each, 0.312 bits per pixel; 1 failed" in said.out
    assert said.err.count("left out:") == 1
    assert "d.png: not an image that Pillow can identify" in said.err
    assert sorted(path.name for path in codes.iterdir()) == ["a.ddcm", "b.ddcm", "c.ddcm"]
    assert {path.stat().st_size for path in codes.iterdir()} == {52 + 3}

    torch.set_num_threads(2)
    assert main(["decode", str(run), str(codes), "--out", str(back)]) == 0
    assert "each bit for bit the encoder's" in capsys.readouterr().out
    torch.set_num_threads(1)
    assert main(["decode", str(run), str(codes / "b.ddcm"), "--out", str(alone)]) == 0
    assert np.array_equal(pixels(alone)["b.png"], pixels(back)["b.png"])
    assert len(pixels(back)) == 3


def test_codes_of_another_model_and_damaged_ones_are_left_out_and_the_rest_is_decoded(run, pictures, tmp_path, capsys):
    codes = tmp_path / "codes"
    assert (
        main(["encode", str(run), str(pictures / "a.png"), str(pictures / "b.png"), "--out", str(codes), *SMALL]) == 0
    )
    capsys.readouterr()
    whole = (codes / "a.ddcm").read_bytes()
    (codes / "cut.ddcm").write_bytes(whole[:-1])
    (codes / "none.ddcm").write_bytes(b"something else")
    (codes / "z.ddcm").write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    assert main(["decode", str(run), str(codes), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "2 images in" in said.out
    assert "cut.ddcm: cut short" in said.err
    assert "none.ddcm: not a .ddcm file" in said.err
    assert "z.ddcm: damaged" in said.err


def test_images_of_one_name_get_files_of_their_own_whatever_the_others_are_called(run, pictures, tmp_path, capsys):
    (pictures / "more").mkdir()
    for name in ("a.png", "a-2.png"):
        (pictures / "more" / name).write_bytes((pictures / "b.png").read_bytes())
    given = [pictures / "a.png", pictures / "more" / "a.png", pictures / "more" / "a-2.png"]
    assert main(["encode", str(run), *map(str, given), "--out", str(tmp_path / "codes"), *SMALL]) == 0
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == ["a-2-2.ddcm", "a-2.ddcm", "a.ddcm"]


def test_nothing_is_overwritten(run, pictures, tmp_path, capsys):
    given = ["encode", str(run), str(pictures / "a.png"), "--out", str(tmp_path / "codes"), *SMALL]
    assert main(given) == 0
    before = (tmp_path / "codes" / "a.ddcm").read_bytes()
    assert main(given) == 2
    assert "a.ddcm exists and is left as it is" in capsys.readouterr().err
    assert (tmp_path / "codes" / "a.ddcm").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codewords", "12"], "codewords must be a power of two, got 12"),
        (["--steps", "1"], "steps must be an integer from 2"),
        (["--atoms", "2", "--gain-bits", "1"], "gain_bits must be at least 2"),
    ],
)
def test_impossible_codes_are_rejected_in_one_line(run, pictures, tmp_path, options, message, capsys):
    given = ["encode", str(run), str(pictures), "--out", str(tmp_path / "codes")]
    assert main([*given, *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_run_without_a_denoiser_and_a_missing_file_are_rejected(run, tmp_path, capsys):
    assert main(["decode", str(run), str(tmp_path / "no.ddcm"), "--out", str(tmp_path / "out")]) == 2
    assert "no file or folder is called" in capsys.readouterr().err
    (tmp_path / "text").mkdir()
    assert main(["encode", str(tmp_path / "text"), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
