"""Drawing images to be measured."""

import pytest
import torch

from danlu.evaluation import draw


class LabelImages:
    """Draws images that hold their class."""

    def __init__(self):
        self.weight = torch.zeros(())

    def parameters(self):
        return iter([self.weight])

    def sample(self, shape, *, steps, generator, labels, guidance):
        return labels.float().view(-1, 1, 1, 1).expand(shape)


@pytest.mark.parametrize("count", [7, 40, 300])
def test_classes_are_spread_evenly_also_over_sorted_labels(count):
    labels = torch.arange(10).repeat_interleave(5)
    generator = torch.Generator().manual_seed(0)
    drawn = draw(LabelImages(), (1, 2, 2), labels, count, steps=1, generator=generator)[:, 0, 0, 0]
    assert drawn.shape == (count,)
    each = drawn.long().bincount(minlength=10)
    assert int(each.max()) - int(each.min()) <= 1
