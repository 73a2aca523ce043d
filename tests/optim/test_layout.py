"""Which matrices a parameter consists of: stacks, splits, kernels, and what is refused."""

import pytest
import torch
from steps import one_step, step
from tensors import gaussian
from torch import nn

from danlu.optim import Muon, declare, param_groups


def test_a_stack_steps_as_its_matrices_apart():
    stack = gaussian(5, 7, 11)
    apart = torch.stack([one_step(matrix, steps=2) for matrix in stack])
    torch.testing.assert_close(one_step(stack, steps=2), apart, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heights", [3, (2, 7, 3)])
def test_rows_that_belong_apart_step_as_separate_parameters(heights):
    gradient = gaussian(12, 5)
    sizes = [4] * 3 if heights == 3 else list(heights)
    parameter = nn.Parameter(torch.zeros(12, 5).double())
    optimizer = Muon([{"params": [parameter], "split": heights}], lr=1.0)
    step(optimizer, gradient)
    apart = torch.cat([one_step(block.contiguous()) for block in gradient.split(sizes)])
    torch.testing.assert_close(parameter.detach(), apart, rtol=0, atol=1e-12)


def test_a_split_declared_on_the_parameter_holds_without_a_group_option():
    gradient = gaussian(12, 5)
    parameter = nn.Parameter(torch.zeros(12, 5).double())
    parameter.danlu_split = 3
    step(Muon([parameter], lr=1.0), gradient)
    apart = torch.cat([one_step(block.contiguous()) for block in gradient.split(4)])
    torch.testing.assert_close(parameter.detach(), apart, rtol=0, atol=1e-12)


def test_experts_may_be_split_too():
    gradient = gaussian(2, 6, 5)
    parameter = nn.Parameter(torch.zeros(2, 6, 5).double())
    step(Muon([{"params": [parameter], "split": (2, 4)}], lr=1.0), gradient)
    apart = torch.stack([torch.cat([one_step(expert[:2]), one_step(expert[2:])]) for expert in gradient])
    torch.testing.assert_close(parameter.detach(), apart, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_flattened_whatever_its_layout(memory_format):
    kernel = gaussian(5, 3, 2, 2)
    parameter = nn.Parameter(torch.zeros(5, 3, 2, 2).double().to(memory_format=memory_format))
    step(Muon([{"params": [parameter], "role": "conv"}], lr=1.0), kernel)
    flat = one_step(kernel.flatten(1))
    torch.testing.assert_close(parameter.detach().contiguous().flatten(1), flat, rtol=0, atol=1e-12)


def test_a_parameter_in_transposed_layout_is_updated():
    gradient = gaussian(7, 5)
    parameter = nn.Parameter(torch.zeros(5, 7).double().mT)
    step(Muon([parameter], lr=1.0), gradient)
    torch.testing.assert_close(parameter.detach(), one_step(gradient), rtol=0, atol=1e-12)


def test_a_vector_is_named():
    with pytest.raises(ValueError, match=r"parameter norm\.weight of group 0 of shape \(3,\).*AdamW"):
        Muon([("norm.weight", nn.Parameter(torch.zeros(3)))])


def test_a_kernel_without_its_role_is_named():
    with pytest.raises(ValueError, match=r"parameter 0 of group 1 .*4 dimensions.*'conv'"):
        Muon([{"params": []}, {"params": [nn.Parameter(torch.zeros(3, 2, 2, 2))]}])


def test_a_declared_embedding_is_refused():
    table = nn.Parameter(torch.zeros(3, 2))
    table.danlu_role = "embedding"
    with pytest.raises(ValueError, match="declared 'embedding'"):
        Muon([table])


def test_a_split_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="split of parameter 0 of group 0 must divide its 5 rows, got 2"):
        Muon([{"params": [nn.Parameter(torch.zeros(5, 2))], "split": 2}])


class TestInputsBeforeOutputs:
    """A weight kept as (inputs, outputs) steps as its transpose does, whatever its split and its scale."""

    @pytest.mark.parametrize("scale", ["moonlight", "jordan", "mup"])
    @pytest.mark.parametrize("split", [None, 3, (2, 7, 3)])
    def test_a_matrix(self, split, scale):
        gradient = gaussian(12, 5)
        upright, transposed = (nn.Parameter(torch.zeros(shape).double()) for shape in ((12, 5), (5, 12)))
        step(Muon([{"params": [upright], "split": split}], lr=1.0, scale=scale), gradient)
        step(Muon([{"params": [transposed], "split": split, "transposed": True}], lr=1.0, scale=scale), gradient.mT)
        assert upright.abs().sum() > 0
        torch.testing.assert_close(transposed.mT, upright, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("scale", ["moonlight", "mup"])
    @pytest.mark.parametrize("split", [None, 2, (2, 4)])
    def test_a_stack(self, split, scale):
        gradient = gaussian(4, 6, 5)
        upright, transposed = (nn.Parameter(torch.zeros(shape).double()) for shape in ((4, 6, 5), (4, 5, 6)))
        step(Muon([{"params": [upright], "split": split}], lr=1.0, scale=scale), gradient)
        step(Muon([{"params": [transposed], "split": split, "transposed": True}], lr=1.0, scale=scale), gradient.mT)
        assert upright.abs().sum() > 0
        torch.testing.assert_close(transposed.mT, upright, rtol=0, atol=1e-12)

    def test_it_may_be_declared_of_the_layer_or_stand_on_the_parameter(self):
        gradient, found = gaussian(5, 12), []
        for how in ("declared", "written", "group"):
            layer = nn.Linear(12, 5, bias=False).double()
            nn.init.zeros_(layer.weight)
            if how == "declared":
                declare(layer, "weight", "matrix", 3, transposed=True)
                groups = param_groups(layer)
                assert [(g["role"], g["split"], g["transposed"]) for g in groups] == [("matrix", 3, True)]
            elif how == "written":
                layer.weight.danlu_split, layer.weight.danlu_transposed = 3, True
                groups = [layer.weight]
            else:
                groups = [{"params": [layer.weight], "split": 3, "transposed": True}]
            step(Muon(groups, lr=1.0, scale="mup"), gradient)
            found.append(layer.weight.detach())
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])

    def test_a_split_counts_outputs(self):
        with pytest.raises(ValueError, match="must divide its 6 rows, got 5"):
            Muon([{"params": [nn.Parameter(torch.zeros(5, 6))], "split": 5, "transposed": True}])

    @pytest.mark.parametrize("groups", [1, 2])
    def test_a_transposed_convolution_of_apart_patches_steps_as_the_linear_layers_that_it_is(self, groups):
        layer = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=groups, bias=False).double()
        width = 6 // groups * 4  # all that one input writes to
        apart = nn.ModuleList(nn.Linear(4 // groups, width, bias=False).double() for _ in range(groups))
        for linear, part in zip(apart, layer.weight.detach().chunk(groups)):
            linear.weight.data = part.flatten(1).mT.contiguous()
        x = gaussian(1, 4, 1, 1)
        written = layer(x).unflatten(1, (groups, -1)).flatten(2)[0]
        torch.testing.assert_close(written, torch.stack([m(v) for m, v in zip(apart, x.flatten().chunk(groups))]))
        layer.weight.grad = gaussian(*layer.weight.shape)
        for linear, part in zip(apart, layer.weight.grad.chunk(groups)):
            linear.weight.grad = part.flatten(1).mT.contiguous()
        for model in (layer, apart):
            Muon(param_groups(model), lr=0.1, scale="mup").step()
        together = torch.cat([linear.weight.detach().mT for linear in apart])
        torch.testing.assert_close(layer.weight.detach().flatten(1), together, rtol=0, atol=1e-12)

    def test_a_table_is_refused(self):
        with pytest.raises(ValueError, match=r"weight is a .*cannot be transposed; accepted are matrix, experts, conv"):
            declare(nn.Linear(4, 6), "weight", "embedding", transposed=True)

    def test_a_transposed_kernel_is_split_by_a_number_of_groups_of_its_inputs(self):
        layer = nn.ConvTranspose2d(4, 6, 2)
        declare(layer, "weight", "conv", 2, transposed=True)
        with pytest.raises(ValueError, match="must divide its 4 rows, got 3"):
            declare(layer, "weight", "conv", 3, transposed=True)
        with pytest.raises(TypeError, match="must be a number of groups for a transposed kernel"):
            declare(layer, "weight", "conv", (12, 12), transposed=True)

    def test_something_that_is_no_bool_is_named(self):
        with pytest.raises(TypeError, match="transposed of weight must be a bool, got 'yes'"):
            declare(nn.Linear(4, 6), "weight", "matrix", transposed="yes")
        with pytest.raises(ValueError, match="transposed must be True, False or None, got 'yes'"):
            Muon([{"params": [nn.Parameter(torch.zeros(5, 6))], "transposed": "yes"}])
