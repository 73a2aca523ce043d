"""The commands on runs that generate images: from nothing to samples, pictures and distances."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from danlu import recipes
from danlu.cli import main
from danlu.report.metrics import read_metrics

TINY = {
    "--train.steps": "3",
    "--optim.lr": "0.05",
    "--schedule.warmup": "1",
    "--train.eval_every": "3",
    "--train.threads": "1",
    "--train.tensorboard": "False",
    "--train.device": "cpu",
    "--data.batch": "20",
    "--model.condition": "8",
    "--model.num_heads": "2",
}


def words(options):
    return [word for name, value in options.items() for word in (name, *value.split())]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("the extra [images] (scikit-learn) is not installed")
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    options = {**TINY, "--data.source": "digits8", "--model.widths": "8 12", "--model.blocks": "1 1"}
    assert main(["train", "digits", "--out", str(folder), *words(options)]) == 0
    return folder


def test_training_ends_with_a_picture_and_a_page_that_shows_it(run):
    with Image.open(run / "samples.png") as picture:
        assert picture.size == (10 * 58 + 2, 6 * 58 + 2)
    page = (run / "report.html").read_text()
    assert 'alt="samples"' in page
    assert "<td>images</td><td>60</td>" in page
    metrics = read_metrics(run)
    assert len(metrics["val_loss"]) == 1
    assert len(metrics["velocity_mse"]) == 3


def test_the_network_was_given_the_sizes_of_the_images(run):
    from danlu.train import load_objective

    objective, config = load_objective(run)
    assert (config.model.image_size, config.model.channels, config.model.num_classes) == (8, 1, 10)
    assert not objective.training


def test_the_same_seed_draws_the_same_picture_and_steps_guide_the_way(run, tmp_path, capsys):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path, seed in zip(paths, "112", strict=True):
        options = ["--count", "6", "--seed", seed, "--classes", "3", "7"]
        assert main(["sample", str(run), "--out", str(path), *options]) == 0
    a, b, c = (np.asarray(Image.open(path)) for path in paths)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    film = tmp_path / "way.gif"
    assert main(["sample", str(run), "--out", str(film), "--steps", "4", "--count", "4"]) == 0
    with Image.open(film) as opened:
        assert opened.n_frames > 1  # equal neighbours are stored once
    assert capsys.readouterr().out.splitlines()[-1] == str(film)


def test_a_run_is_measured_by_a_classifier_that_is_trained_once(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path))
    short = recipes.load("digits-classifier")
    short = replace(short, train=replace(short.train, steps=4, threads=1, device="cpu"))
    monkeypatch.setattr(recipes, "load", lambda name: short)
    found = []
    for steps in ("1", "1", "2"):
        assert main(["eval", str(run), "--count", "40", "--steps", steps]) == 0
        found.append(dict(line.split() for line in capsys.readouterr().out.splitlines()))
    assert found[0] == found[1]
    assert (found[0]["steps"], found[2]["steps"]) == ("1", "2")
    assert set(found[0]) == {
        "val_loss",
        "steps",
        "frechet_distance",
        "frechet_floor",
        "kernel_distance",
        "precision",
        "recall",
        "copies",
    }
    # Three steps of training draw noise: further away than other digits are.
    assert float(found[0]["frechet_distance"]) > 2 * float(found[0]["frechet_floor"])
    classifiers = list((tmp_path / "features").iterdir())
    assert len(classifiers) == 1
    given = ["eval", str(run), "--count", "40", "--steps", "1", "--features", str(classifiers[0])]
    assert main(given) == 0
    assert dict(line.split() for line in capsys.readouterr().out.splitlines()) == found[0]


def test_a_folder_of_ones_own_images_trains_and_without_classes_cannot_be_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DANLU_CACHE", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    for index in range(8):
        Image.new("RGB", (9, 9), (30 * index, 0, 0)).save(tmp_path / "in" / f"{index}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"bad")
    out = tmp_path / "run"
    options = {**TINY, "--data.size": "8", "--data.batch": "4", "--model.widths": "8", "--model.blocks": "1"}
    assert main(["train", "images", "--data", str(tmp_path / "in"), "--out", str(out), *words(options)]) == 0
    assert "1 of 9 images were left out." in " ".join(capsys.readouterr().out.split())
    assert main(["eval", str(out), "--count", "16"]) == 2
    assert "these images have no classes" in capsys.readouterr().err
    assert main(["sample", str(out), "--classes", "1"]) == 2
    assert "was trained without classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be an integer of at least 1, got 0"),
        (["--out", "x.bmp"], "--out, its suffix, must be one of '.png', '.jpg', '.webp', '.gif'"),
        (["--classes", "ten"], "--classes must be one of '0', '1'"),
        (["--prompt", "a"], "--prompt is for runs on text"),
        (["--top-p", "0.9"], "--top-p is for runs on text"),
        (["--repetition-penalty", "1.1"], "--repetition-penalty is for runs on text"),
        (["--count", "0"], "--count must be an integer of at least 1, got 0"),
        (["--guidance", "2"], "guidance is learned in training by MeanFlow"),
        (["--upsample", "2"], "upsample must be 1 for an objective without a denoiser of larger images, got 2"),
        (["--upsample", "0"], "--upsample must be an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_be_drawn_is_rejected_in_one_line(run, options, message, capsys):
    assert main(["sample", str(run), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
