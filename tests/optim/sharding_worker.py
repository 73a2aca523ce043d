"""Checks that need several processes, run by ``test_sharded.py``: ``python sharding_worker.py RANK STORE FOLDER``.

Each check is a function of the world of four processes; what it raises goes into ``FOLDER/RANK.json``.
"""

import copy
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import danlu.optim.muon
from danlu.nn.linear import declare
from danlu.optim import (
    Muon,
    MuonConfig,
    NonFiniteGuard,
    build_optimizers,
    clip_grad_norm_,
    declarations_kept,
    grad_norm,
)

# (shape, cut dimension or None for replicas, role, split)
ZOO = [
    ((5, 3), 0, None, None),
    ((1, 7), 0, None, None),
    ((7, 1), 0, None, None),
    ((7, 1), 1, None, None),
    ((3, 3), 0, None, None),
    *3 * [((8, 6), 0, None, None)],
    ((8, 6), 1, None, None),
    ((5, 11), 1, None, None),
    ((3, 3), None, None, None),
    ((12, 5), 0, None, 3),
    ((12, 5), 0, None, (2, 7, 3)),
    ((12, 5), 1, None, (2, 7, 3)),
    ((5, 4, 6), 0, None, None),
    ((5, 4, 6), 0, None, 2),
    ((5, 4, 6), 1, None, (1, 3)),
    ((5, 4, 6), 2, None, 2),
    ((2, 3, 4, 6), 0, "experts", None),
    ((2, 3, 4, 6), 1, "experts", None),
    ((2, 3, 4, 6), 3, "experts", None),
    ((5, 3, 2, 2), 0, "conv", None),
    ((5, 3, 2, 2), 1, "conv", None),
]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stepped(place, *, steps=3, weights=torch.float64, **options):
    """Return the optimizer and the parameters of the zoo after some steps; ``place`` puts a tensor where it belongs."""
    params = [
        nn.Parameter(place(gaussian(*shape, seed=i, dtype=weights), dim)) for i, (shape, dim, *_) in enumerate(ZOO)
    ]
    groups = [
        {"params": [(f"p{index}", parameter)], "role": role, "split": split}
        for index, (parameter, (_, _, role, split)) in enumerate(zip(params, ZOO))
        if role or split
    ]
    plain = [(f"p{i}", p) for i, (p, (_, _, role, split)) in enumerate(zip(params, ZOO)) if not (role or split)]
    optimizer = Muon([{"params": plain}, *groups], lr=0.1, **options)
    for step in range(steps):
        give(params, place, seed=100 * (step + 1), dtype=weights)
        optimizer.step()
    return optimizer, params


def give(params, place, *, seed, dtype=torch.float64):
    for index, (parameter, (shape, dim, *_)) in enumerate(zip(params, ZOO)):
        parameter.grad = place(gaussian(*shape, seed=seed + index, dtype=dtype), dim)


def here(tensor, dim):
    return tensor


def cut_over(mesh):
    return lambda tensor, dim: distribute_tensor(tensor, mesh, [Replicate() if dim is None else Shard(dim)])


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def assert_all_near(params, reference, *, atol=1e-11):
    for index, (got, expected) in enumerate(zip(params, reference, strict=True)):
        torch.testing.assert_close(
            full(got), full(expected), rtol=0, atol=atol, msg=lambda text, i=index: f"{ZOO[i]}: {text}"
        )


def assert_same_everywhere(tensors, group=None):
    for tensor in tensors:
        copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(copies, tensor.detach().contiguous(), group=group)
        assert all(torch.equal(copy, copies[0]) for copy in copies)


class World:
    def __init__(self, folder):
        self.folder, self.rank = folder, dist.get_rank()
        self.four = init_device_mesh("cpu", (4,))
        self.grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        pairs = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
        self.pair = pairs[self.rank // 2]
        self.alone = stepped(here)


def check_cut_matrices_step_as_whole_ones_on_four(world):
    optimizer, params = stepped(cut_over(world.four))
    assert_all_near(params, world.alone[1])
    for parameter in params:
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert momentum.placements == parameter.placements
        assert momentum.to_local().shape == parameter.to_local().shape


def check_cut_matrices_step_as_whole_ones_on_two(world):
    _, params = stepped(cut_over(world.pair), scale="rms", maximize=True, ema=False)
    assert_all_near(params, stepped(here, scale="rms", maximize=True, ema=False)[1])


def check_replicas_step_as_one_and_stay_bit_identical_on_four(world):
    _, params = stepped(here, process_group=dist.group.WORLD)
    assert_all_near(params, world.alone[1])
    assert_same_everywhere(params)


def check_replicas_step_as_one_and_stay_bit_identical_on_two(world):
    group = world.pair.get_group()
    optimizer, params = stepped(here, process_group=group, nesterov=False)
    assert_all_near(params, stepped(here, nesterov=False)[1])
    assert_same_everywhere(params, group)
    assert_same_everywhere([optimizer.state[p]["momentum_buffer"] for p in params], group)


def check_bounded_exchanges_give_the_same_step(world):
    for options in ({"process_group": dist.group.WORLD}, {}):
        place = here if options else cut_over(world.four)
        _, params = stepped(place, chunk_bytes=1, foreach=True, **options)
        assert_all_near(params, world.alone[1])


def check_bfloat16_travels(world):
    options = {"dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16, "weights": torch.float32, "steps": 1}
    _, alone = stepped(here, **options)
    for place, group in ((cut_over(world.four), None), (here, dist.group.WORLD)):
        _, params = stepped(place, process_group=group, **options)
        # Rounding to bfloat16, 2^-8 relative, may fall differently where matrices are iterated in other company.
        assert_all_near(params, alone, atol=0.1 * 0.2 * 7**0.5 * 2**-5)


def check_a_hybrid_mesh_steps_as_one(world):
    def place(tensor, dim):
        return distribute_tensor(tensor, world.grid, [Replicate(), Replicate() if dim is None else Shard(dim)])

    assert_all_near(stepped(place, foreach=True)[1], world.alone[1])


def check_a_gradient_placed_otherwise_than_its_parameter_is_moved(world):
    weight = nn.Parameter(distribute_tensor(gaussian(5, 3), world.four, [Shard(0)]))
    whole = nn.Parameter(gaussian(5, 3))
    weight.grad = distribute_tensor(gaussian(5, 3, seed=1), world.four, [Replicate()])
    whole.grad = gaussian(5, 3, seed=1)
    Muon([weight]).step()
    Muon([whole]).step()
    torch.testing.assert_close(full(weight), whole.detach())


def check_each_matrix_is_iterated_once_and_work_is_balanced(world):
    iterated = []
    original = danlu.optim.muon.orthogonalize

    def counting(stack, *args, **kwargs):
        iterated.extend(stack.shape[0] * [tuple(stack.shape[1:])])
        return original(stack, *args, **kwargs)

    danlu.optim.muon.orthogonalize = counting
    try:
        for place, group in ((cut_over(world.four), None), (here, dist.group.WORLD)):
            iterated.clear()
            params = [nn.Parameter(place(gaussian(16, 24, seed=i), 0)) for i in range(10)]
            params += [nn.Parameter(place(gaussian(16, 8, seed=i), 1)) for i in range(5)]
            for parameter in params:
                parameter.grad = parameter.detach().clone()
            Muon(params, process_group=group).step()
            shares = [None] * 4
            dist.all_gather_object(shares, list(iterated))
            assert sum(map(len, shares)) == 15
            # Ten of cost 3 or so and five of cost 1: nobody has more than one small matrix over the mean.
            assert sorted(share.count((16, 24)) for share in shares) == [2, 2, 3, 3]
            for share in shares:
                assert (share.count((16, 24)) == 3) == (share.count((16, 8)) == 0) or share.count((16, 8)) <= 3
    finally:
        danlu.optim.muon.orthogonalize = original


def check_a_bucket_costs_two_collectives_cut_and_one_replicated(world):
    for place, group, each in ((cut_over(world.four), None, 2), (here, dist.group.WORLD, 1)):
        params = [nn.Parameter(place(gaussian(8, 12, seed=i), i % 2)) for i in range(7)]
        params += [nn.Parameter(place(gaussian(4, 6, seed=i), 0)) for i in range(3)]
        for parameter in params:
            parameter.grad = parameter.detach().clone()
        optimizer = Muon(params, process_group=group)
        with CommDebugMode() as counted:
            optimizer.step()
        assert counted.get_total_counts() == 2 * each, counted.get_comm_counts()


def check_experts_that_lie_whole_on_a_process_cost_nothing(world):
    weight = nn.Parameter(cut_over(world.four)(gaussian(6, 4, 5), 0))
    weight.grad = weight.detach().clone()
    optimizer = Muon([weight])
    with CommDebugMode() as counted:
        optimizer.step()
    assert counted.get_total_counts() == 0


def check_a_copy_shares_with_the_same_processes(world):
    optimizer, _ = stepped(here, process_group=dist.group.WORLD)
    twin = copy.deepcopy(optimizer)
    assert twin.process_group is optimizer.process_group
    others = [p for group in twin.param_groups for p in group["params"]]
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    for a, b in zip(mine, others):
        a.grad = b.grad = gaussian(*a.shape)
    optimizer.step()
    twin.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, others))


def check_a_compiled_step_is_the_eager_one(world):
    if world.rank > 1:
        return
    made = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        cut = nn.Parameter(cut_over(world.pair)(gaussian(5, 7), 0))
        replica = nn.Parameter(gaussian(5, 7))
        optimizer = Muon([cut, replica], lr=torch.tensor(0.1), process_group=world.pair.get_group())
        step = wrap(optimizer.step)
        for seed in range(2):
            cut.grad = cut_over(world.pair)(gaussian(5, 7, seed=seed), 0)
            replica.grad = gaussian(5, 7, seed=seed)
            step()
        made.append(torch.stack([full(cut), full(replica)]))
    assert torch.equal(*made)


class Net(nn.Module):
    """Two layers; the first holds three matrices of its own in one weight, and knows it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 15, bias=False, dtype=torch.float64)
        declare(self.first.weight, "matrix", split=(9, 3, 3))
        self.second = nn.Linear(15, 1, dtype=torch.float64)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def trained(mesh=None, *, steps=range(3), restore=None):
    """Return a net trained on some batches, sharded over a mesh or whole, and its optimizers."""
    net = Net()
    if mesh is not None:
        with declarations_kept(net):
            fully_shard(net.first, mesh=mesh)
            fully_shard(net, mesh=mesh)
    optimizers = build_optimizers(net, MuonConfig(lr=0.1))
    if restore:
        load(net, optimizers, *restore)
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        net(gaussian(8, 6, seed=step)).square().mean().backward()
        clip_grad_norm_(net.parameters(), 0.1)
        for optimizer in optimizers:
            optimizer.step()
    return net, optimizers


def state(net, optimizers):
    model, optimizer = get_state_dict(net, optimizers)
    return {"model": model, "optimizer": optimizer}


def load(net, optimizers, path, group):
    held = state(net, optimizers)
    dcp.load(held, checkpoint_id=path, process_group=group, no_dist=group is None)
    set_state_dict(net, optimizers, model_state_dict=held["model"], optim_state_dict=held["optimizer"])


def check_a_sharded_model_trains_as_a_whole_one(world):
    assert {group["split"] for group in trained(world.four)[1][0].param_groups} == {None, (9, 3, 3)}
    for mesh in (world.four, world.pair, world.grid):
        for got, expected in zip(trained(mesh)[0].parameters(), trained()[0].parameters(), strict=True):
            torch.testing.assert_close(full(got), expected.detach(), rtol=0, atol=1e-11)


def check_checkpoints_go_on_at_another_number_of_processes(world):
    expected = [full(p) for p in trained(steps=range(6))[0].parameters()]
    two, four = world.folder / "two", world.folder / "four"
    if world.rank < 2:
        dcp.save(state(*trained(world.pair)), checkpoint_id=two, process_group=world.pair.get_group())
    dcp.save(state(*trained(world.four)), checkpoint_id=four, process_group=world.four.get_group())
    dist.barrier()
    later = {"steps": range(3, 6)}
    for path, mesh in ((two, None), (two, world.four), (four, world.pair), (four, None)):
        group = None if mesh is None else mesh.get_group()
        net, _ = trained(mesh, restore=(path, group), **later)
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


def check_shards_and_replicas_count_once_in_the_norm(world):
    for mesh in (world.four, world.pair):
        made = {"cut": [], "whole": []}
        for index, (shape, dim, *_) in enumerate([*ZOO, ((11,), None)]):
            for kind, place in (("cut", cut_over(mesh)), ("whole", here)):
                plain = kind == "whole" or len(shape) == 1  # and one parameter that is no DTensor
                put = here if plain else place
                parameter = nn.Parameter(put(torch.zeros(shape), dim))
                parameter.grad = put(gaussian(*shape, seed=index, dtype=torch.float32), dim)
                made[kind].append(parameter)
        torch.testing.assert_close(clip_grad_norm_(made["cut"], 1.5), clip_grad_norm_(made["whole"], 1.5))
        for got, expected in zip(made["cut"], made["whole"]):
            torch.testing.assert_close(full(got.grad), expected.grad)


def check_one_shard_that_overflows_float32_is_clipped_on_all(world):
    gradient = torch.ones(8, 3)
    gradient[5] *= 1e30
    weight = nn.Parameter(cut_over(world.four)(torch.zeros(8, 3), 0))
    weight.grad = cut_over(world.four)(gradient, 0)
    norm = clip_grad_norm_([weight], 1.0)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.item(), 3**0.5 * 1e30, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_norm([weight]).item(), 1.0, rtol=1e-6, atol=0)


def check_a_nan_in_one_shard_stops_all_and_names_the_parameter(world):
    good, bad = (nn.Parameter(cut_over(world.four)(torch.zeros(8, 3), 0)) for _ in range(2))
    gradient = torch.ones(8, 3)
    good.grad = cut_over(world.four)(gradient, 0)
    gradient[6, 1] = torch.nan
    bad.grad = cut_over(world.four)(gradient, 0)
    guard = NonFiniteGuard(patience=1)
    names = [("good", good), ("layer.bad", bad)]
    norm = clip_grad_norm_([good, bad], 1.0)
    assert torch.equal(full(good.grad), torch.ones(8, 3))
    assert not guard.allows(norm, names)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row, in layer\.bad$"):
        guard.allows(norm, names)


def check_a_parameter_cut_twice_is_refused_by_name(world):
    weight = nn.Parameter(distribute_tensor(gaussian(4, 6), world.grid, [Shard(0), Shard(1)]))
    with pytest.raises(ValueError, match=r"parameter w of group 0 is placed as .*accepted is one Shard"):
        Muon([("w", weight)])


def check_a_decay_of_singular_values_takes_whole_experts_and_refuses_cut_matrices(world):
    expert = nn.Parameter(cut_over(world.four)(gaussian(6, 4, 5), 0))
    whole = nn.Parameter(gaussian(6, 4, 5))
    expert.grad, whole.grad = torch.zeros_like(expert), torch.zeros_like(whole)
    Muon([expert], decay="spectral").step()
    Muon([whole], decay="spectral").step()
    torch.testing.assert_close(full(expert), whole.detach())
    with pytest.raises(ValueError, match=r"parameter w of group 0 is placed as .*decay must be 'decoupled'"):
        Muon([("w", nn.Parameter(cut_over(world.four)(gaussian(4, 5), 0)))], decay="spectral")


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def main(rank, store, folder):
    limit = timedelta(seconds=300)  # a check that fails on one process leaves others waiting
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=limit)
    world, outcome = World(folder), {}
    for name, check in CHECKS.items():
        try:
            check(world)
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(outcome))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
