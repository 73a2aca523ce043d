"""Evaluation of a trained model beyond its validation loss: the texts and images that it generates.

``measure_images`` compares the images that a run draws with held-out ones; its distances between sets of feature
vectors (``frechet_distance``, ``kernel_distance``, ``precision_recall``, ``copied_share``) also work on vectors of your
own. ``continuation`` and ``continuations`` write text.

>>> import torch
>>> from danlu.evaluation import frechet_distance
>>> x = torch.tensor([[0.0], [2.0]])
>>> frechet_distance(x, x + 3)
9.0
"""

from danlu.evaluation.distances import (
    copied_share,
    frechet_distance,
    kernel_distance,
    nearest_distances,
    precision_recall,
)
from danlu.evaluation.images import (
    class_names,
    draw,
    draw_classes,
    feature_network,
    measure,
    measure_images,
    sampling_steps,
)
from danlu.evaluation.text import continuation, continuations

__all__ = [
    "class_names",
    "continuation",
    "continuations",
    "copied_share",
    "draw",
    "draw_classes",
    "feature_network",
    "frechet_distance",
    "kernel_distance",
    "measure",
    "measure_images",
    "nearest_distances",
    "precision_recall",
    "sampling_steps",
]
