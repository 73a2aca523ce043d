"""Checks of Muon on four processes."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from sharding_world import ZOO, assert_same_everywhere, cut_over, full, here, placed
from tensors import gaussian
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import danlu.optim.muon_step
from danlu.optim import Muon


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


def assert_all_near(params, reference, *, atol=1e-11):
    for index, (got, expected) in enumerate(zip(params, reference, strict=True)):
        torch.testing.assert_close(
            full(got), full(expected), rtol=0, atol=atol, msg=lambda text, i=index: f"{ZOO[i]}: {text}"
        )


@functools.cache
def alone():
    """Return the zoo as one process steps it."""
    return stepped(here)[1]


def check_cut_matrices_step_as_whole_ones_on_four(world):
    optimizer, params = stepped(cut_over(world.four))
    assert_all_near(params, alone())
    for parameter in params:
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert momentum.placements == parameter.placements
        assert momentum.to_local().shape == parameter.to_local().shape


def check_cut_matrices_step_as_whole_ones_on_two(world):
    _, params = stepped(cut_over(world.pair), scale="rms", maximize=True, ema=False)
    assert_all_near(params, stepped(here, scale="rms", maximize=True, ema=False)[1])


def check_replicas_step_as_one_and_stay_bit_identical_on_four(world):
    _, params = stepped(here, process_group=dist.group.WORLD)
    assert_all_near(params, alone())
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
        assert_all_near(params, alone())


def check_bfloat16_travels(world):
    options = {"dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16, "weights": torch.float32, "steps": 1}
    _, alone = stepped(here, **options)
    for place, group in ((cut_over(world.four), None), (here, dist.group.WORLD)):
        _, params = stepped(place, process_group=group, **options)
        # Rounding to bfloat16, 2^-8 relative, may fall differently where matrices are iterated in other company.
        assert_all_near(params, alone, atol=0.1 * 0.2 * 7**0.5 * 2**-5)


def check_a_hybrid_mesh_steps_as_one(world):
    def place(tensor, dim):
        return placed(tensor, world.grid, [Replicate(), Replicate() if dim is None else Shard(dim)])

    assert_all_near(stepped(place, foreach=True)[1], alone())


def check_a_gradient_placed_otherwise_than_its_parameter_is_moved(world):
    weight = nn.Parameter(placed(gaussian(5, 3), world.four, [Shard(0)]))
    whole = nn.Parameter(gaussian(5, 3))
    weight.grad = placed(gaussian(5, 3, seed=1), world.four, [Replicate()])
    whole.grad = gaussian(5, 3, seed=1)
    Muon([weight]).step()
    Muon([whole]).step()
    torch.testing.assert_close(full(weight), whole.detach())


def check_each_matrix_is_iterated_once_and_work_is_balanced(world):
    iterated = []
    original = danlu.optim.muon_step.orthogonalize

    def counting(stack, *args, **kwargs):
        iterated.extend(stack.shape[0] * [tuple(stack.shape[1:])])
        return original(stack, *args, **kwargs)

    danlu.optim.muon_step.orthogonalize = counting
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
        danlu.optim.muon_step.orthogonalize = original


def check_a_bucket_costs_two_collectives_cut_and_one_replicated(world):
    for place, group, each in ((cut_over(world.four), None, 2), (here, dist.group.WORLD, 1)):
        params = [nn.Parameter(place(gaussian(8, 12, seed=i), i % 2)) for i in range(7)]
        params += [nn.Parameter(place(gaussian(4, 6, seed=i), 0)) for i in range(3)]
        for parameter in params:
            parameter.grad = parameter.detach().clone()
        optimizer = Muon(params, process_group=group)
        with CommDebugMode() as counted:
            optimizer.step()
        # And one that compares which parameters have a gradient.
        assert counted.get_total_counts() == 2 * each + 1, counted.get_comm_counts()


def check_experts_that_lie_whole_on_a_process_send_nothing_of_themselves(world):
    weight = nn.Parameter(cut_over(world.four)(gaussian(6, 4, 5), 0))
    weight.grad = weight.detach().clone()
    optimizer = Muon([weight])
    with CommDebugMode() as counted:
        optimizer.step()
    assert counted.get_total_counts() == 1  # which parameters have a gradient


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


def check_a_decay_of_singular_values_takes_whole_experts_and_refuses_cut_matrices(world):
    expert = nn.Parameter(cut_over(world.four)(gaussian(6, 4, 5), 0))
    whole = nn.Parameter(gaussian(6, 4, 5))
    expert.grad, whole.grad = torch.zeros_like(expert), torch.zeros_like(whole)
    Muon([expert], decay="spectral").step()
    Muon([whole], decay="spectral").step()
    torch.testing.assert_close(full(expert), whole.detach())
    with pytest.raises(
        ValueError, match=r"parameter w of group 0 is placed as .*sharded; accepted is decay='decoupled' only"
    ):
        Muon([("w", nn.Parameter(cut_over(world.four)(gaussian(4, 5), 0)))], decay="spectral")


def check_weights_kept_transposed_step_as_their_transposes_however_they_are_cut(world):
    cases = [
        (shape, dim, split)
        for shape, splits in (((8, 12), (None, 3, (2, 7, 3))), ((6, 8, 12), (None, 2, (5, 7))))
        for dim in range(len(shape))
        for split in splits
    ]
    for index, (shape, dim, split) in enumerate(cases):
        start, gradient = gaussian(*shape, seed=index), gaussian(*shape, seed=100 + index)
        weight = nn.Parameter(placed(start, world.four, [Shard(dim)]))
        upright = nn.Parameter(start.mT.contiguous())
        weight.grad = placed(gradient, world.four, [Shard(dim)])
        upright.grad = gradient.mT.contiguous()
        Muon([{"params": [weight], "split": split, "transposed": True}], lr=1.0, scale="mup").step()
        Muon([{"params": [upright], "split": split}], lr=1.0, scale="mup").step()
        torch.testing.assert_close(full(weight).mT, upright.detach(), rtol=0, atol=1e-11)


def check_replicas_whose_gradients_differ_are_named_on_every_process(world):
    params = [nn.Parameter(gaussian(4, 6, seed=i)) for i in range(3)]
    optimizer = Muon([(f"p{i}", p) for i, p in enumerate(params)], process_group=dist.group.WORLD)
    before = [p.detach().clone() for p in params]
    for index, parameter in enumerate(params):
        parameter.grad = None if index == 1 and world.rank else torch.ones_like(parameter)
    with pytest.raises(ValueError, match="parameter p1 of group 0 has a gradient on 1 of 4 processes"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params))
    for parameter in params[:2]:  # on none it is passed over, as ever
        parameter.grad = None
    optimizer.step()
    assert torch.equal(before[0], params[0])
    assert not torch.equal(before[2], params[2])


def check_a_shard_without_a_gradient_has_a_zero_one(world):
    def grads(place):
        made = []
        for i, (shape, dim) in enumerate((((8, 6), 0), ((8, 4, 6), 0), ((6, 8), 1))):
            whole = gaussian(*shape, seed=10 + i)
            whole.narrow(dim, 0, 2).zero_()  # what the first process holds
            made.append(place(whole, dim))
        return made

    results = []
    for place in (here, cut_over(world.four)):
        params = [
            nn.Parameter(place(gaussian(*shape), dim)) for shape, dim in (((8, 6), 0), ((8, 4, 6), 0), ((6, 8), 1))
        ]
        optimizer = Muon(params, lr=0.1)
        for _ in range(2):
            for parameter, grad in zip(params, grads(place)):
                parameter.grad = None if place is not here and world.rank == 0 else grad
            optimizer.step()
        results.append([full(p) for p in params])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-11)


def check_experts_sharded_over_two_dimensions_of_a_mesh_step_as_whole_ones(world):
    shape = (6, 4, 8)
    for first, second in ((0, 1), (1, 0), (0, 2), (0, 0)):
        for split in (None, 2):
            params = [
                nn.Parameter(gaussian(*shape)),
                nn.Parameter(placed(gaussian(*shape), world.grid, [Shard(first), Shard(second)])),
            ]
            for parameter in params:
                optimizer = Muon([{"params": [parameter], "split": split}], lr=0.1)
                for seed in range(2):
                    grad = gaussian(*shape, seed=seed)
                    whole = parameter is params[0]
                    parameter.grad = grad if whole else placed(grad, world.grid, [Shard(first), Shard(second)])
                    optimizer.step()
            torch.testing.assert_close(full(params[1]), params[0].detach(), rtol=0, atol=1e-11)
