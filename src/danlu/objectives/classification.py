"""Classification of images by cross-entropy."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danlu._validate import number
from danlu.protocols import Batch, Measure


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """How the cross-entropy is computed."""

    smoothing: float = 0.0
    """label smoothing: share of the target's probability spread evenly over all classes, in training only"""

    def __post_init__(self) -> None:
        number("smoothing", self.smoothing, low=0, high=1, high_open=True)

    def build(self, model: nn.Module, **others: Any) -> "Classification":
        """Make the objective around a network that gives logits."""
        return Classification(model, self)


class Classification(nn.Module):
    """Cross-entropy of the classes of images, summed over images.

    Args:
        model: a network that returns logits ``(b, classes)`` of images; held as ``self.model``.
        config: see `ClassificationConfig`.

    A batch is a mapping with ``images`` ``(b, c, h, w)`` and ``labels`` ``(b,)``, int64.

    >>> from danlu.models import ConvNet, ConvNetConfig
    >>> objective = Classification(ConvNet(ConvNetConfig(image_size=8, widths=(4,))))
    >>> batch = {"images": torch.zeros(3, 1, 8, 8), "labels": torch.tensor([1, 2, 3])}
    >>> objective(batch).shape, objective.denominator(batch).item()
    (torch.Size([]), 3)
    """

    unit = "images"
    labels = {"val_accuracy": "accuracy"}  # noqa: RUF012
    scores = ("val_accuracy",)

    def __init__(self, model: nn.Module, config: ClassificationConfig | None = None) -> None:
        super().__init__()
        self.model, self.config = model, ClassificationConfig() if config is None else config

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss in nats, float32."""
        smoothing = self.config.smoothing if self.training else 0.0
        logits = self.model(batch["images"])
        return F.cross_entropy(logits.float(), batch["labels"], reduction="sum", label_smoothing=smoothing)

    def denominator(self, batch: Batch) -> Tensor:
        """Number of images, int64."""
        return torch.tensor(len(batch["labels"]), device=batch["labels"].device)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Measure]:
        """Measure ``val_loss`` in nats per image and ``val_accuracy``, the share classified correctly."""
        device = next(self.model.parameters()).device
        loss, right, count = torch.zeros(3, dtype=torch.float64, device=device).unbind()
        for batch in batches:
            logits, labels = self.model(batch["images"]), batch["labels"]
            loss += F.cross_entropy(logits.float(), labels, reduction="sum")
            right += (logits.argmax(-1) == labels).sum()
            count += len(labels)
        return {"val_loss": Measure(loss, count), "val_accuracy": Measure(right, count)}

    def metrics(self) -> dict[str, float]:
        """Return further metrics of the last batch: none."""
        return {}
