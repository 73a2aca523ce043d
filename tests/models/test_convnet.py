import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from danlu.models import ConvNet, ConvNetConfig


def test_features_are_what_the_head_classifies_and_images_do_not_touch_one_another():
    net = ConvNet(ConvNetConfig(channels=3, image_size=12, num_classes=5, widths=(4, 6), features=7)).double()
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    logits = torch.nn.functional.silu(net.features(x)) @ net.head.weight.T
    assert torch.allclose(net(x), logits, rtol=0, atol=1e-12)
    assert torch.allclose(net(x[1:2]), logits[1:2], rtol=0, atol=1e-12)
    assert net.features(x).shape == (3, 7)


def test_flops_are_those_that_torch_counts():
    net = ConvNet(ConvNetConfig(channels=3, image_size=12, num_classes=5, widths=(4, 6), features=7))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.randn(2, 3, 12, 12))
    assert net.flops == counter.get_total_flops() / 2


def test_sizes_that_do_not_fit_are_rejected():
    with pytest.raises(ValueError, match="image_size that 4 divides, got 30"):
        ConvNet(ConvNetConfig(image_size=30))
    with pytest.raises(ValueError, match="at least one level"):
        ConvNet(ConvNetConfig(widths=()))
    with pytest.raises(ValueError, match=r"images must be \(batch, 1, height, width\)"):
        ConvNet(ConvNetConfig())(torch.zeros(2, 3, 28, 28))
