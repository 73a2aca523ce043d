"""What the objectives on images share: a validation that repeats, and the classes a network is told."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from danlu._validate import integer
from danlu.diffusion import classifier_free
from danlu.protocols import Batch, Measure


class ImageObjective(nn.Module):
    """An objective on images whose one number is the mean over images of ``_loss``.

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
        return self._loss(batch, None)

    def _loss(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """The sum over images, with everything random drawn from ``generator``."""
        raise NotImplementedError

    def denominator(self, batch: Batch) -> Tensor:
        """Return the number of images, int64."""
        return torch.tensor(len(batch["images"]), device=batch["images"].device)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Measure]:
        """Measure ``val_loss``, the mean over images of the loss, with the same noise every time."""
        device = next(self.model.parameters()).device
        total, count = torch.zeros(2, dtype=torch.float64, device=device).unbind()
        generator = torch.Generator(device).manual_seed(0)
        for batch in batches:
            total += self._loss(batch, generator)
            count += len(batch["images"])
        return {"val_loss": Measure(total, count)}

    def metrics(self) -> dict[str, float]:
        """Return what else there is to report of the last batch: nothing."""
        return {}


def class_labels(
    model: nn.Module, labels: Tensor | None, count: int, *, dropout: float = 0.0, generator: torch.Generator | None
) -> Tensor | None:
    """Return the classes to tell ``model`` about ``count`` images, int64, or None if it has none.

    ``model.num_classes`` stands for "no class": without labels for all, with labels for a random share ``dropout``.
    """
    none = int(getattr(model, "num_classes", 0))
    if not none:
        return None
    device = next(model.parameters()).device
    if labels is None:
        return torch.full((count,), none, device=device)
    labels = labels.to(device)
    if not dropout:
        return labels
    return torch.where(torch.rand(count, device=device, generator=generator) < dropout, none, labels)


def check_sampling(
    model: nn.Module, shape: tuple[int, ...], labels: Tensor | None, guidance: float | None, *, upsample: int = 1
) -> tuple[torch.device, Tensor | None]:
    """Check what a ``sample`` method was asked for; return the device to draw on and the classes.

    ``upsample`` is passed on by objectives that have no use for it.
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
    return next(model.parameters()).device, class_labels(model, labels, shape[0], generator=None)


def guided_call(
    predict: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    model: nn.Module,
    classes: Tensor | None,
    guidance: float | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``predict`` with its classes filled in, guided if that is asked for."""
    if classes is None or guidance in (None, 1):
        return lambda x, t: predict(x, t, classes)
    return classifier_free(predict, classes, none=int(model.num_classes), scale=guidance)  # type: ignore


def mean_square(error: Tensor) -> Tensor:
    """Mean over everything but the first dimension of the squares, ``(b,)``, float32 or wider."""
    return error.to(torch.promote_types(error.dtype, torch.float32)).square().flatten(1).mean(1)
