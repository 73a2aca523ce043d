"""Measure a generator of images: draw from it and compare with the images that it has not seen."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from danlu._validate import integer
from danlu.analysis import copied_share, frechet_distance, kernel_distance, precision_recall
from danlu.config import fingerprint
from danlu.data import ImagesData, to_bytes, to_float
from danlu.train import RunConfig, run
from danlu.train.device import cache_dir

Features = Callable[[Tensor], Tensor]
_BATCH = 128


def feature_network(config: RunConfig, *, sha256: str = "") -> nn.Module:
    """Return the network that a classifier's run trains: from the cache, or trained now and kept there.

    Args:
        config: of the classifier, such as the recipe ``digits-classifier``; an interrupted training is gone on with.
        sha256: of the data, so that another set under the same path is another entry.

    Raises:
        ValueError, OSError: as :func:`danlu.train.train`.
    """
    folder = cache_dir() / "features" / fingerprint({"run": fingerprint(config), "data": sha256})[:32]
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        run.train(config, folder, quiet=True)
    else:
        run.resume(folder, quiet=True)
    return run.load(folder)[0]


def draw(
    objective: Any,
    shape: tuple[int, int, int],
    labels_n: Tensor | None,
    count: int,
    *,
    steps: int,
    generator: torch.Generator,
    guidance: float | None = None,
) -> Tensor:
    """Draw ``count`` images ``(count, *shape)`` in portions, of classes spread over all of ``labels_n`` (or none)."""
    integer("count", count)
    device = next(objective.parameters()).device
    if labels_n is not None:
        # Labels may be sorted: the first of them would be of a few classes only.
        turns = torch.arange(count)
        labels_n = labels_n[turns * len(labels_n) // count if count < len(labels_n) else turns % len(labels_n)]
    parts = []
    for start in range(0, count, _BATCH):
        size = min(_BATCH, count - start)
        labels = None if labels_n is None else labels_n[start : start + size].to(device)
        parts.append(
            objective.sample((size, *shape), steps=steps, generator=generator, labels=labels, guidance=guidance).cpu()
        )
    return torch.cat(parts)


def measure(generated: Tensor, data: ImagesData, features: Features) -> dict[str, float]:
    """Compare generated images with the held-out ones of ``data``.

    Args:
        generated: ``(n, c, h, w)`` from -1 to 1.
        data: the images that the generator was trained on.
        features: vectors ``(b, d)`` of images ``(b, c, h, w)`` from -1 to 1: the ``features`` of a classifier trained
            on the same data, or any network of your own, such as an Inception network behind a resize.

    Returns:
        ``frechet_distance`` and ``kernel_distance`` to the held-out images, ``frechet_floor`` (as many training images
        to the held-out ones: what a perfect generator would be near), ``precision``, ``recall``, and ``copies``, the
        share nearer in pixels to a training image than all but a hundredth of the held-out images are.
    """
    train, held_out = data.train.examples["images"], data.held_out["images"]
    # Through bytes, as they would be stored: no distance for what no file could hold.
    drawn = to_bytes(generated)
    vectors = {name: _vectors(images, features) for name, images in (("drawn", drawn), ("held", held_out))}
    # Spread evenly: a data set may be sorted by class.
    chosen = torch.arange(min(len(drawn), len(train))) * len(train) // min(len(drawn), len(train))
    floor = _vectors(train[chosen], features)
    precision, recall = precision_recall(vectors["drawn"], vectors["held"])
    return {
        "frechet_distance": frechet_distance(vectors["drawn"], vectors["held"]),
        "frechet_floor": frechet_distance(floor, vectors["held"]),
        "kernel_distance": kernel_distance(vectors["drawn"], vectors["held"]),
        "precision": precision,
        "recall": recall,
        "copies": copied_share(*(to_float(images).flatten(1) for images in (drawn, train, held_out))),
    }


@torch.no_grad()
def _vectors(images: Tensor, features: Features) -> Tensor:
    def parts() -> Iterator[Tensor]:
        for part in images.split(_BATCH):
            yield features(to_float(part)).cpu()

    return torch.cat(list(parts()))
