"""Draw images from a trained generator, and compare them with held-out images.

The comparison uses the features of a classifier of the same images (:func:`feature_network` trains one and caches it),
or of any network of your own.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danlu._cache import cache_folder
from danlu._validate import integer
from danlu.config import fingerprint
from danlu.data import ImagesConfig, ImagesData, to_bytes, to_float
from danlu.evaluation.distances import copied_share, frechet_distance, kernel_distance, precision_recall
from danlu.protocols import Generator
from danlu.train import RunConfig, load, run

Features = Callable[[Tensor], Tensor]
_BATCH = 128


def sampling_steps(objective: Generator, steps: int | None = None) -> int:
    """Return the number of steps to sample with: ``steps``, or the objective's default if None.

    Raises:
        ValueError, TypeError: ``steps`` is not a positive integer.
    """
    if steps is None:
        return objective.sampling_steps
    integer("steps", steps)
    return steps


def class_names(folder: str | Path, count: int) -> list[str]:
    """Return the names of a run's classes from its ``manifest.json``, or numbers if it has none."""
    path = Path(folder) / "manifest.json"
    found = json.loads(path.read_text()).get("classes") if path.is_file() else None
    return [str(name) for name in found] if found else [str(number) for number in range(count)]


def draw_classes(
    objective: Any,
    model: Any,
    count: int,
    *,
    classes: Tensor | None = None,
    steps: int,
    seed: int | None,
    **options: Any,
) -> Tensor:
    """Draw images ``(count, c, h, w)`` of ``classes`` in turn, in one batch, for display.

    Args:
        objective: of a run that generates images, as :func:`danlu.train.load_objective` returns it.
        model: configuration of its network, with ``num_classes``, ``image_size`` and ``channels``.
        count: number of images.
        classes: class labels, int64 ``(k,)``; None for all, ignored by a network without classes.
        steps: of the sampler.
        seed: of the draws; None for a different seed each time.
        options: of the objective's own ``sample``, such as ``guidance``, ``upsample`` (which multiplies h and w) or
            ``trajectory`` (then the result is ``(steps, count, c, h, w)``).

    Raises:
        ValueError: the objective rejects an option.
    """
    integer("count", count)
    device = next(objective.parameters()).device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    labels = None
    if model.num_classes:
        labels = torch.arange(model.num_classes) if classes is None else classes
        labels = labels[torch.arange(count) % len(labels)].to(device)
    side = model.image_size * options.get("upsample", 1)
    shape = (count, model.channels, side, side)
    drawn: Tensor = objective.sample(shape, steps=steps, generator=generator, labels=labels, **options)
    return drawn


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
    """Draw many images ``(count, *shape)`` in batches, with class labels spread evenly over ``labels_n`` (or without).

    Args:
        objective: with ``sample``, as the objectives of :mod:`danlu.objectives` that generate images.
        shape: ``(c, h, w)``.
        labels_n: int64 ``(n,)``, such as those of the held-out images; None for an objective without classes.
        count: number of images.
        steps: of the sampler.
        generator: source of all randomness, on the objective's device.
        guidance: scale of classifier-free guidance; None for the objective's own.
    """
    integer("count", count)
    device = next(objective.parameters()).device
    if labels_n is not None:
        # Labels may be sorted: the first ones alone would cover a few classes only.
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
        features: function from images ``(b, c, h, w)`` from -1 to 1 to vectors ``(b, d)``: the ``features`` of a
            classifier trained on the same data, or any network of your own, such as a resize and an Inception network.

    Returns:
        ``frechet_distance`` and ``kernel_distance`` to the held-out images, ``frechet_floor`` (the Frechet distance of
        as many training images to the held-out ones, about that of a perfect generator), ``precision``, ``recall``, and
        ``copies``, the share nearer in pixels to a training image than all but a hundredth of the held-out images are.
    """
    train, held_out = data.train.examples["images"], data.held_out["images"]
    # Rounded to bytes, as they would be stored: differences that no file could hold do not count.
    drawn = to_bytes(generated)
    vectors = {name: _vectors(images, features) for name, images in (("drawn", drawn), ("held", held_out))}
    # Spread evenly: a data set may be sorted by class.
    chosen = torch.arange(min(len(drawn), len(train))) * len(train) // min(len(drawn), len(train))
    reference = _vectors(train[chosen], features)
    precision, recall = precision_recall(vectors["drawn"], vectors["held"])
    return {
        "frechet_distance": frechet_distance(vectors["drawn"], vectors["held"]),
        "frechet_floor": frechet_distance(reference, vectors["held"]),
        "kernel_distance": kernel_distance(vectors["drawn"], vectors["held"]),
        "precision": precision,
        "recall": recall,
        "copies": copied_share(*(to_float(images).flatten(1) for images in (drawn, train, held_out))),
    }


@torch.no_grad()
def _vectors(images: Tensor, features: Features) -> Tensor:
    return torch.cat([features(to_float(part)).cpu() for part in images.split(_BATCH)])


def measure_images(
    objective: Any,
    data: ImagesData,
    network: Any,
    count: int = 500,
    *,
    steps: int,
    seed: int = 0,
    guidance: float | None = None,
) -> dict[str, float]:
    """Draw ``count`` images of the held-out images' classes and :func:`measure` them.

    Args:
        objective: with ``sample``, on the device to draw on.
        data: the images that it was trained on.
        network: with ``features``, as :func:`feature_network` returns it, on the objective's device.
        count: number of images, at least 16: distances of fewer are meaningless.
        steps: of the sampler.
        seed: of the draws.
        guidance: as in :func:`draw`.

    Returns:
        As :func:`measure`.
    """
    integer("count", count, low=16)
    device = next(objective.parameters()).device
    _, channels, height, width = data.held_out["images"].shape
    drawn = draw(
        objective,
        (channels, height, width),
        data.held_out["labels"] if getattr(objective.model, "num_classes", 0) else None,
        count,
        steps=steps,
        generator=torch.Generator(device).manual_seed(seed),
        guidance=guidance,
    )
    return measure(drawn, data, lambda images: network.features(images.to(device)))


def feature_network(classifier: RunConfig, images: ImagesConfig | None = None, *, sha256: str = "") -> nn.Module:
    """Return the network that a classifier's run trains: from the cache, or trained now and cached.

    Args:
        classifier: configuration of the run, such as the recipe ``digits-classifier``; an interrupted training is
            resumed.
        images: data to train it on, without their augmentation and in the classifier's own batch size, so that all
            generators of the same images share one network; None for the classifier's own data.
        sha256: of the data, so that different data under the same path have different cache entries.

    Raises:
        ValueError, OSError: as :func:`danlu.train.train`.
    """
    if images is not None:
        own: Any = classifier.data
        classifier = replace(classifier, data=replace(images, augment=(), batch=own.batch))
    folder = cache_folder() / "features" / fingerprint({"run": fingerprint(classifier), "data": sha256})[:32]
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        run.train(classifier, folder, quiet=True)
    else:
        run.resume(folder, quiet=True)
    return load(folder)[0]
