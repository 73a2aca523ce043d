import math

import pytest
import torch
from torch import nn

from danlu.objectives import Classification, ClassificationConfig, evaluate


class Fixed(nn.Module):
    """Logits that are its parameters, whatever the image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits[: len(x)]


BATCH = {"images": torch.zeros(3, 1, 2, 2), "labels": torch.tensor([0, 1, 1])}
LOGITS = [[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def test_the_loss_is_the_sum_of_cross_entropies_and_accuracy_the_share_that_is_right():
    objective = Classification(Fixed(LOGITS))
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1)) + math.log(1 + math.exp(-1))
    assert abs(objective(BATCH).item() - expected) < 1e-6
    assert objective.denominator(BATCH).item() == 3
    one = {name: tensor[:1] for name, tensor in BATCH.items()}
    found = evaluate(objective, [BATCH, one])
    assert abs(found["val_loss"] - (expected + math.log(1 + math.exp(-2))) / 4) < 1e-6
    assert found["val_accuracy"] == 0.75
    assert objective.training


def test_smoothing_acts_in_training_only():
    objective = Classification(Fixed(LOGITS), ClassificationConfig(smoothing=0.2))
    plain = Classification(Fixed(LOGITS))
    assert objective(BATCH) > plain(BATCH)
    assert evaluate(objective, [BATCH]) == evaluate(plain, [BATCH])
    with pytest.raises(ValueError, match="must hold images"):
        evaluate(objective, [])
    with pytest.raises(ValueError, match="smoothing must be in"):
        ClassificationConfig(smoothing=1.0)
