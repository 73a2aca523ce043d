"""Sentences around images of digits: what is shown, said and asked for, and that a number gives the same example."""

import importlib.util
import json

import pytest
import torch

from danlu.data.captions import VOCABULARY, CaptionLoader, CaptionsConfig, Sentences, open_captions
from danlu.data.images import ImagesConfig, open_images


def images(count: int = 11, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 1, size, size), generator=generator, dtype=torch.uint8), torch.arange(
        count
    ) % 10


def sentences(**changes: object) -> Sentences:
    config = CaptionsConfig(**{"patch": 3, "batch": 12, **changes})  # type: ignore[arg-type]
    return Sentences(*images(), config, name="test")


def words(row: torch.Tensor) -> list[str]:
    return [VOCABULARY[i] for i in row.tolist()]


def assembled(batch: dict[str, torch.Tensor], row: int, patch: int) -> torch.Tensor:
    """The image of an example, put together from its patches by their grid."""
    grid = batch["grid"][row]
    h, w = grid[:, 2].max().item(), grid[:, 3].max().item()
    image = torch.full((h * patch, w * patch), torch.nan)
    for (i, j, *_), values in zip(grid.tolist(), batch["patches"][row]):
        if i:
            image[(i - 1) * patch : i * patch, (j - 1) * patch : j * patch] = values.view(patch, patch)
    return image


def test_the_patches_of_an_example_make_up_the_digits_that_its_words_name() -> None:
    made, (pixels, _) = sentences(), images()
    batch = made.batch(range(200))
    shapes = set()
    for row in range(200):
        image = assembled(batch, row, 3)
        rows, columns = image.shape[0] // 6, image.shape[1] // 6
        shapes.add((rows, columns))
        said = [word for word, i in zip(words(batch["tokens"][row]), batch["grid"][row, :, 0]) if not i]
        spoken = said[said.index("shows") + 1 :] if "shows" in said else said[1 : said.index(":")]
        spoken = spoken[: spoken.index("<end>")] if "<end>" in spoken else spoken
        lines = " ".join(spoken).split(" over ")
        assert [len(line.split()) for line in lines] == [columns] * rows
        for r, line in enumerate(lines):
            for c, digit in enumerate(line.split()):
                part = image[6 * r : 6 * r + 6, 6 * c : 6 * c + 6]
                shown = [n for n in range(11) if torch.equal(pixels[n, 0], (255 * part).round().byte())]
                assert [n % 10 for n in shown] == [int(digit)]
    assert shapes == {(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)}


def test_a_caption_asks_for_its_words_and_a_drawing_for_its_patches() -> None:
    batch = sentences().batch(range(60))
    for row in range(60):
        targets, draws, patch = batch["targets"][row], batch["draws"][row], batch["grid"][row, :, 0] > 0
        tokens = batch["tokens"][row]
        asked = targets != -100
        following = tokens.roll(-1)
        assert torch.equal(targets[asked], following[asked])
        assert not following[asked].eq(VOCABULARY.index("<pad>")).any()
        if draws.any():
            assert torch.equal(draws.roll(1), patch)
            assert words(targets[asked]) == ["</img>", "<end>"]
        else:
            assert words(targets[asked])[-1] == "<end>"
            assert asked.nonzero()[0].item() == words(tokens).index("shows")


def test_an_example_depends_on_its_number_only_and_ranks_share_a_batch() -> None:
    whole = CaptionLoader(sentences())
    ranks = [CaptionLoader(sentences(), rank=rank, world=3) for rank in range(3)]
    next(whole), [next(rank) for rank in ranks]
    together, apart = next(whole), [next(rank) for rank in ranks]
    for name, tensor in together.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in apart]))
    again = CaptionLoader(sentences(), rank=2, world=4)
    again.load_state_dict(ranks[0].state_dict())
    assert torch.equal(next(again)["tokens"], next(whole)["tokens"][6:9])


def test_a_state_of_other_data_is_rejected() -> None:
    state = CaptionLoader(sentences(), sha256="a").state_dict()
    with pytest.raises(ValueError, match="sha256"):
        CaptionLoader(sentences(), sha256="b").load_state_dict(state)


@pytest.mark.parametrize("drawn", [0.0, 1.0, 0.25])
def test_the_share_of_drawings_is_as_asked(drawn: float) -> None:
    batch = sentences(drawn=drawn).batch(range(400))
    share = batch["draws"].any(-1).float().mean().item()
    assert abs(share - drawn) <= 4 * (drawn * (1 - drawn) / 400) ** 0.5


def test_a_patch_that_does_not_divide_the_digits_is_rejected() -> None:
    with pytest.raises(ValueError, match="patch must divide the digits' side of 6"):
        sentences(patch=4)
    for name, value in [("digits", 7), ("drawn", 1.5), ("validation_examples", 0), ("source", "digits9")]:
        with pytest.raises(ValueError, match=name):
            CaptionsConfig(**{name: value})  # type: ignore[arg-type]


def test_validation_shows_digits_that_training_never_does() -> None:
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("the extra [images] (sklearn) is not installed")
    data = open_captions(CaptionsConfig(batch=30, validation_examples=70))
    kept = open_images(ImagesConfig(source="digits8")).held_out["images"]
    assert torch.equal(data.held_out.patches[:, 0], kept[:, 0, :4, :4].flatten(1) / 255)
    assert len(data.train.sentences.labels) + len(kept) == 1797
    batches = list(data.validation())
    assert [len(batch["tokens"]) for batch in batches] == [30, 30, 10]
    assert torch.equal(next(iter(data.validation(1)))["tokens"], batches[0]["tokens"])
    assert json.loads(json.dumps(data.manifest)) == data.manifest
