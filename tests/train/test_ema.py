import pytest
import torch
from torch import nn

from danlu.train.ema import averaged


def test_the_average_follows_its_recurrence() -> None:
    decay = 0.3
    module = nn.Linear(3, 2).double()
    average = averaged(module, decay)
    expected = None
    for n in range(6):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3))
        average.update_parameters(module)
        d = min(decay, (1 + n) / (10 + n))
        expected = module.weight.clone() if expected is None else d * expected + (1 - d) * module.weight
        torch.testing.assert_close(average.module.weight, expected, rtol=1e-14, atol=1e-14)


def test_buffers_are_the_latest() -> None:
    module = nn.BatchNorm1d(3)
    average = averaged(module, 0.9)
    module(torch.randn(5, 3))
    average.update_parameters(module)
    module(torch.randn(5, 3))
    average.update_parameters(module)
    assert torch.equal(average.module.running_mean, module.running_mean)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be in"):
        averaged(nn.Linear(1, 1), decay)
