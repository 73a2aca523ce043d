"""Checks of whole models on four processes: training and checkpoints, sharded as FSDP2 does it."""

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharding_world import cut_over, full
from tensors import gaussian
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from danlu._roles import declare
from danlu.optim import (
    AmosConfig,
    LionConfig,
    Muon,
    MuonConfig,
    TigerConfig,
    clip_grad_norm_,
)


class Net(nn.Module):
    """Two layers and a norm; the first holds three matrices of its own in one weight, and knows it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 15, bias=False, dtype=torch.float64)
        declare(self.first, "weight", "matrix", split=(9, 3, 3))
        self.norm = nn.LayerNorm(15, dtype=torch.float64)
        self.second = nn.Linear(15, 1, dtype=torch.float64)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


CONFIGS = (MuonConfig(lr=0.1), AmosConfig(lr=0.1), LionConfig(lr=0.01), TigerConfig(lr=0.05))


def trained(config, mesh=None, *, steps=range(3), restore=None):
    """Return a net trained on some batches, sharded over a mesh or complete, and its optimizer."""
    net = Net()
    if mesh is not None:
        fully_shard(net.first, mesh=mesh)
        fully_shard(net, mesh=mesh)
    optimizer = config.build(net)
    if restore:
        load(net, optimizer, *restore)
    for step in steps:
        optimizer.zero_grad()
        net(gaussian(8, 6, seed=step)).square().mean().backward()
        clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
    return net, optimizer


def state(net, optimizer):
    of_model, of_optimizer = get_state_dict(net, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def load(net, optimizer, path, group):
    held = state(net, optimizer)
    dcp.load(held, checkpoint_id=path, process_group=group, no_dist=group is None)
    set_state_dict(net, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])


def check_a_sharded_model_trains_as_a_whole_one(world):
    assert {group["split"] for group in trained(CONFIGS[0], world.four)[1].param_groups} >= {None, (9, 3, 3)}
    for config in CONFIGS:
        expected = list(trained(config)[0].parameters())
        for mesh in (world.four, world.pair, world.grid):
            for got, wanted in zip(trained(config, mesh)[0].parameters(), expected, strict=True):
                torch.testing.assert_close(full(got), wanted.detach(), rtol=0, atol=1e-11)


def check_checkpoints_go_on_at_another_number_of_processes(world):
    for config in CONFIGS[:2]:  # Lion's and Tiger's state is of Muon's form
        expected = [full(p) for p in trained(config, steps=range(6))[0].parameters()]
        two, four = (world.folder / f"{type(config).__name__}-{number}" for number in ("two", "four"))
        if world.rank < 2:
            dcp.save(state(*trained(config, world.pair)), checkpoint_id=two, process_group=world.pair.get_group())
        dcp.save(state(*trained(config, world.four)), checkpoint_id=four, process_group=world.four.get_group())
        dist.barrier()
        later = {"steps": range(3, 6)}
        for path, mesh in ((two, None), (two, world.four), (four, world.pair), (four, None)):
            group = None if mesh is None else mesh.get_group()
            net, _ = trained(config, mesh, restore=(path, group), **later)
            for got, wanted in zip(net.parameters(), expected, strict=True):
                torch.testing.assert_close(full(got), wanted, rtol=0, atol=1e-11)


def check_a_whole_state_dict_is_cut_and_a_cut_one_made_whole(world):
    weight = nn.Parameter(cut_over(world.four)(gaussian(5, 3), 0))
    whole = nn.Parameter(gaussian(5, 3))
    optimizer, alone = Muon([weight]), Muon([whole])
    weight.grad, whole.grad = cut_over(world.four)(gaussian(5, 3, seed=1), 0), gaussian(5, 3, seed=1)
    optimizer.step()
    alone.step()
    expected = alone.state[whole]["momentum_buffer"].clone()
    cut_state, whole_state = copy.copy(optimizer.state_dict()), copy.deepcopy(alone.state_dict())
    alone.load_state_dict(cut_state)
    optimizer.load_state_dict(whole_state)
    torch.testing.assert_close(alone.state[whole]["momentum_buffer"], expected)
    held = optimizer.state[weight]["momentum_buffer"]
    assert held.placements == weight.placements
    torch.testing.assert_close(held.full_tensor(), expected)
