"""What the objectives on images share: a reproducible validation loss, and the class labels given to a network."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from danlu._draws import bernoulli
from danlu._validate import integer
from danlu.diffusion import classifier_free
from danlu.objectives.draws import keys_of, numbered
from danlu.protocols import Batch, Measure


class ImageObjective(nn.Module):
    """Base of objectives on images whose only measure is the mean over images of ``_loss``.

    Args:
        model: the network, held as ``self.model``.
    """

    unit = "images"
    sampling_steps = 50
    labels: Mapping[str, str] = {}

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss summed over images, float32."""
        return self._loss(batch, keys_of(batch, batch["images"]))

    def _loss(self, batch: Batch, keys: Tensor) -> Tensor:
        """Return the loss summed over images, with everything random a function of ``keys``, one for each image."""
        raise NotImplementedError

    def denominator(self, batch: Batch) -> Tensor:
        """Return the number of images, int64."""
        return torch.tensor(len(batch["images"]), device=batch["images"].device)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Measure]:
        """Measure ``val_loss``, the loss averaged over images, with the same noise for an image every time."""
        device = next(self.model.parameters()).device
        total, count = torch.zeros(2, dtype=torch.float64, device=device).unbind()
        for batch in numbered(batches):
            total += self._loss(batch, keys_of(batch, batch["images"]))
            count += len(batch["images"])
        return {"val_loss": Measure(total, count)}

    def metrics(self) -> dict[str, float]:
        """Return further metrics of the last batch: none."""
        return {}


def class_labels(
    model: nn.Module, labels: Tensor | None, count: int, *, dropout: float = 0.0, keys: Tensor | None = None
) -> Tensor | None:
    """Return the class labels of ``count`` images to give to ``model``, int64, or None for a model without classes.

    ``model.num_classes`` stands for "no class". Without labels all images get it, with labels a share ``dropout``
    that is a function of ``keys``.
    """
    none = int(getattr(model, "num_classes", 0))
    if not none:
        return None
    device = next(model.parameters()).device
    if labels is None:
        return torch.full((count,), none, device=device)
    labels = labels.to(device)
    if not dropout or keys is None:
        return labels
    return torch.where(bernoulli(keys, "label dropout", dropout), none, labels)


def check_sampling(
    model: nn.Module, shape: tuple[int, ...], labels: Tensor | None, guidance: float | None, *, upsample: int = 1
) -> tuple[torch.device, Tensor | None]:
    """Check the arguments of a ``sample`` method; return the device to draw on and the class labels.

    Objectives that do not support ``upsample`` pass it here, where any value but 1 raises.
    """
    if upsample != 1:
        raise ValueError(f"upsample must be 1 for an objective without a denoiser of larger images, got {upsample}")
    if len(shape) != 4:
        raise ValueError(f"shape must be (images, channels, height, width), got {tuple(shape)}")
    for name, size in zip(("images", "channels", "height", "width"), shape, strict=True):
        integer(f"shape: {name}", size)
    classes = int(getattr(model, "num_classes", 0))
    if labels is not None:
        if not classes:
            raise ValueError("labels were given, and the model was trained without classes")
        if labels.shape != (shape[0],) or int(labels.min()) < 0 or int(labels.max()) > classes:
            raise ValueError(f"labels must be {shape[0]} integers from 0 to {classes} ({classes}: no class)")
    if guidance not in (None, 1) and labels is None:
        raise ValueError(f"guidance {guidance} needs labels to guide towards")
    return next(model.parameters()).device, class_labels(model, labels, shape[0])


def guided_call(
    predict: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    model: nn.Module,
    classes: Tensor | None,
    guidance: float | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``predict`` as a function of x and t for these class labels, with guidance if ``guidance`` is given."""
    if classes is None or guidance in (None, 1):
        return lambda x, t: predict(x, t, classes)
    return classifier_free(predict, classes, none=int(model.num_classes), scale=guidance)  # type: ignore


def mean_square(error: Tensor) -> Tensor:
    """Return the squares averaged over all but the first dimension, ``(b,)``, float32 or wider."""
    return error.to(torch.promote_types(error.dtype, torch.float32)).square().flatten(1).mean(1)
