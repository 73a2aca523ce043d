"""Checks of matrices that lie among processes in an unusual way: sharded twice, or kept with inputs first."""

import copy

import pytest
import torch
from sharding_world import full, placed
from tensors import gaussian
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from danlu.optim import Muon

TWICE = [  # matrices sharded over both dimensions of a mesh, evenly, unevenly, with and without a split
    ((8, 6), (0, 1), None, False),
    ((8, 6), (1, 0), 2, False),
    ((7, 5), (0, 0), (4, 3), False),
    ((6, 9), (1, 1), None, False),
    ((6, 9), (1, 0), 3, True),
    ((3, 6, 4), (1, 2), 2, False),
    ((3, 6, 4), (2, 1), (1, 3), True),
]


def check_matrices_sharded_over_both_dimensions_of_a_mesh_step_as_whole_ones(world):
    results = []
    for cut in (False, True):
        params, groups = [], []
        for shape, dims, split, transposed in TWICE:
            start = gaussian(*shape)
            params.append(nn.Parameter(placed(start, world.grid, [Shard(d) for d in dims]) if cut else start))
            params[-1].danlu_transposed = transposed
            groups.append({"params": params[-1:], "split": split})
        optimizer = Muon(groups, lr=0.1, scale="mup")
        for seed in range(2):
            for parameter, (shape, dims, *_) in zip(params, TWICE):
                grad = gaussian(*shape, seed=seed)
                parameter.grad = placed(grad, world.grid, [Shard(d) for d in dims]) if cut else grad
            optimizer.step()
        results.append((params, [optimizer.state[p]["momentum_buffer"] for p in params]))
    for (weight, expected), (momentum, other) in zip(
        zip(results[1][0], results[0][0]), zip(results[1][1], results[0][1])
    ):
        torch.testing.assert_close(full(weight), expected.detach(), rtol=0, atol=1e-11)
        torch.testing.assert_close(full(momentum), other, rtol=0, atol=1e-11)
        assert momentum.placements == weight.placements


def check_tensor_parallelism_under_fully_shard_steps_as_whole_layers(world):
    """The same dimension sharded by both: the shards of one are those of the other, cut again."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for style in (ColwiseParallel, RowwiseParallel):
        whole = nn.Linear(6, 8, bias=False)
        with torch.no_grad():
            whole.weight.copy_(gaussian(8, 6, dtype=torch.float32))
        model = copy.deepcopy(whole)
        parallelize_module(model, mesh["tensor"], style())
        fully_shard(model, mesh=mesh["data"])
        optimizers = [Muon(layer.parameters(), lr=0.1, dtype=torch.float64) for layer in (whole, model)]
        gradient = gaussian(8, 6, seed=1, dtype=torch.float32)
        whole.weight.grad = gradient
        model.weight.grad = placed(gradient, mesh, [Replicate(), Replicate()]).redistribute(
            placements=model.weight.placements
        )
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(full(model.weight), whole.weight.detach(), rtol=0, atol=1e-6)


def check_a_matrix_sharded_twice_is_refused_where_it_must_be_complete(world):
    weight = nn.Parameter(placed(gaussian(4, 6), world.grid, [Shard(0), Shard(1)]))
    with pytest.raises(ValueError, match=r"parameter w of group 0 is placed as .*accepted is decay='decoupled' only"):
        Muon([("w", weight)], decay="spectral")
    term = DTensor.from_local(torch.zeros(3, 3), world.four, [Partial()], run_check=False)
    with pytest.raises(ValueError, match=r"parameter w of group 0 is placed as .*accepted is"):
        Muon([("w", nn.Parameter(term))])


def check_the_kernel_of_a_transposed_convolution_steps_as_a_whole_one_however_it_is_cut(world):
    for shape, dim, split in (
        ((5, 3, 2, 2), 0, None),
        ((5, 3, 2, 2), 1, None),
        ((4, 2, 6), 2, None),
        ((8, 3, 2), 0, 4),
        ((8, 3, 2), 1, 2),
        ((12, 3, 2), 0, 2),
    ):
        start, gradient = gaussian(*shape), gaussian(*shape, seed=1)
        params = [nn.Parameter(start.clone()), nn.Parameter(placed(start, world.four, [Shard(dim)]))]
        params[0].grad, params[1].grad = gradient, placed(gradient, world.four, [Shard(dim)])
        group = {"role": "conv", "split": split, "transposed": True}
        if split == 2 and not dim:
            with pytest.raises(ValueError, match=r"holds 2 maps of 6 inputs.* accepted are whole maps on every"):
                Muon([{"params": params[1:], **group}])
            continue
        for parameter in params:
            Muon([{"params": [parameter], **group}], lr=0.1, scale="mup").step()
        torch.testing.assert_close(full(params[1]), params[0].detach(), rtol=0, atol=1e-11)
