"""The U-Net's convolution in forward mode."""

import torch
from torch.profiler import profile

from danlu.models.unet import Convolution


def test_a_convolution_in_forward_mode_equals_torchs_and_takes_two_convolutions():
    torch.manual_seed(0)
    ours = Convolution(5)
    reference = torch.nn.Conv2d(5, 5, 3, padding=1)
    reference.load_state_dict(ours.state_dict())
    x, v = torch.randn(2, 2, 7, 11, 5)

    def plain(x):
        return reference(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    for found, expected in zip(torch.func.jvp(ours, (x,), (v,)), torch.func.jvp(plain, (x,), (v,)), strict=True):
        torch.testing.assert_close(found, expected)

    def convolutions(function):
        with profile() as seen:
            torch.func.jvp(function, (x,), (v,))
        return sum(event.name == "aten::convolution" for event in seen.events())

    assert convolutions(ours) == 2 < convolutions(plain)


def test_the_forward_derivative_of_a_convolution_has_a_gradient_and_follows_its_weight():
    torch.manual_seed(0)
    layer = Convolution(3).double()
    x, v = torch.randn(2, 1, 5, 7, 3, dtype=torch.float64)
    x.requires_grad_()
    # Linear in x: the derivative along v is the convolution of v without the bias, whatever x.
    _, slope = torch.func.jvp(layer, (x,), (v,))
    slope.square().sum().backward()
    found = layer.weight.grad.clone()
    layer.weight.grad = None
    (layer(v) - layer.bias).square().sum().backward()
    torch.testing.assert_close(found, layer.weight.grad)
    names = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    along = {name: torch.randn_like(parameter) for name, parameter in names.items()}
    _, moved = torch.func.jvp(lambda p: torch.func.functional_call(layer, p, (x.detach(),)), (names,), (along,))
    expected = torch.func.functional_call(layer, along, (x.detach(),))
    torch.testing.assert_close(moved, expected)
