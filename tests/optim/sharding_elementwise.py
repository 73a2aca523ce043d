"""Checks of Lion, Tiger and Amos on four processes."""

import copy

import pytest
import torch
from sharding_world import ZOO, cut_over, full, here, placed
from tensors import gaussian
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from danlu.optim import Amos, Lion, Tiger

# (shape, cut dimension, role): every role, cut where its means are taken and where they are not, unevenly, not at all.
PARAMETERS = [
    *((shape, dim, role) for shape, dim, role, _ in ZOO),
    ((11,), 0, "gain"),
    ((3,), 0, "bias"),
    ((), None, "gain"),
    ((7, 5), 0, "embedding"),
    ((7, 5), 1, "embedding"),
    ((5, 7), 1, "head"),
]
KINDS = {
    "Lion": lambda groups: Lion(groups, lr=0.1, weight_decay=0.3),
    "Tiger": lambda groups: Tiger(groups, lr=0.1, weight_decay=0.3),
    "Tiger, accumulating": lambda groups: Tiger(groups, lr=0.1, accumulate=2, maximize=True),
    "Tiger, unscaled": lambda groups: Tiger(groups, lr=0.1, scale="none"),
    "Amos": lambda groups: Amos(groups, lr=0.3, beta=0.9),
    "Amos with momentum": lambda groups: Amos(groups, lr=0.3, momentum=0.9, clip=1.5, extra_l2=0.01, maximize=True),
}


def give(params, place, seed):
    for index, (parameter, (shape, dim, _)) in enumerate(zip(params, PARAMETERS)):
        parameter.grad = place(gaussian(*shape, seed=seed + index), dim)


def stepped(make, place, *, steps):
    """Return the optimizer and its parameters after some steps; ``place`` puts a tensor where it belongs."""
    params = [nn.Parameter(place(gaussian(*shape, seed=i), dim)) for i, (shape, dim, _) in enumerate(PARAMETERS)]
    roles = sorted({role for *_, role in PARAMETERS}, key=str)
    groups = [{"params": [p for p, (*_, r) in zip(params, PARAMETERS) if r == role], "role": role} for role in roles]
    optimizer = make(groups)
    for step in range(steps):
        give(params, place, 100 * (step + 1))
        optimizer.step()
    return optimizer, params


def assert_near(params, reference):
    for (got, expected), which in zip(zip(params, reference, strict=True), PARAMETERS):
        shard = placed(expected.detach(), got.device_mesh, got.placements).to_local()
        torch.testing.assert_close(
            got.to_local(), shard, rtol=0, atol=1e-11, msg=lambda text, which=which: f"{which}: {text}"
        )


def check_lion_tiger_and_amos_step_cut_parameters_as_whole_ones(world):
    def once(tensor, dim):
        return placed(tensor, world.grid, [Replicate(), Replicate() if dim is None else Shard(dim)])

    def twice(tensor, dim):
        return placed(tensor, world.grid, 2 * [Replicate() if dim is None else Shard(dim)])

    def crossed(tensor, dim):
        first = Replicate() if tensor.ndim < 2 else Shard(tensor.ndim - 1 - (dim or 0))
        return placed(tensor, world.grid, [first, Replicate() if dim is None else Shard(dim)])

    for name, make in KINDS.items():
        steps = 4 if "accumulating" in name else 2  # two updates each: the second meets a state
        _, alone = stepped(make, here, steps=steps)
        for place in (cut_over(world.four), cut_over(world.pair), once, twice, crossed):
            optimizer, params = stepped(make, place, steps=steps)
            assert_near(params, alone)
            for parameter, state in optimizer.state.items():
                momentum = state.get("exp_avg", parameter)
                assert momentum.placements == parameter.placements, name
                assert momentum.to_local().shape == parameter.to_local().shape, name


def check_lion_tiger_and_amos_move_a_gradient_placed_otherwise(world):
    for make in KINDS.values():
        cut, whole = nn.Parameter(cut_over(world.four)(gaussian(5, 3), 1)), nn.Parameter(gaussian(5, 3))
        optimizers = [make([cut]), make([whole])]
        for seed in range(2):
            whole.grad = gaussian(5, 3, seed=seed)
            cut.grad = placed(whole.grad, world.four, [Replicate()])
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(full(cut), whole.detach(), rtol=0, atol=1e-11)


def check_amos_keeps_the_slots_of_cut_rows_with_the_rows(world):
    cut = cut_over(world.four)
    params = [
        nn.Parameter(cut(gaussian(5, 3), 0)),
        nn.Parameter(cut(gaussian(5, 3), 1)),
        nn.Parameter(cut(gaussian(5), 0)),
    ]
    for parameter in params:
        parameter.grad = parameter.detach().clone()
    optimizer = Amos(params)
    with CommDebugMode() as counted:
        optimizer.step()
    assert counted.get_total_counts() == 2, counted.get_comm_counts()  # which gradients there are, and the sums
    placements = [optimizer.state[p]["exp_avg_sq"].placements for p in params]
    assert placements == [(Shard(0),), (Replicate(),), (Replicate(),)]
    assert [tuple(optimizer.state[p]["decay"].shape) for p in params] == [(5, 1), (5, 1), (1,)]
    assert optimizer.state[params[0]]["decay"].to_local().shape == (params[0].to_local().shape[0], 1)


def check_lion_exchanges_nothing_and_tiger_one_sum_and_which_gradients_there_are(world):
    for make, most in ((KINDS["Lion"], 0), (KINDS["Tiger"], 2)):
        params = [nn.Parameter(cut_over(world.four)(gaussian(5, 3, seed=i), i % 2)) for i in range(4)]
        for parameter in params:
            parameter.grad = parameter.detach().clone()
        optimizer = make(params)
        with CommDebugMode() as counted:
            optimizer.step()
        assert counted.get_total_counts() == most, counted.get_comm_counts()


def check_a_nan_on_one_process_shrinks_the_whole_parameter_under_tiger(world):
    weight = nn.Parameter(cut_over(world.four)(gaussian(8, 3), 0))
    gradient = torch.ones(8, 3, dtype=torch.float64)
    gradient[5, 1] = torch.nan
    weight.grad = cut_over(world.four)(gradient, 0)
    optimizer = Tiger([weight], shrink=0.5)
    optimizer.step()
    assert torch.equal(full(weight), 0.5 * gaussian(8, 3))
    assert not full(optimizer.state[weight]["exp_avg"]).any()


def check_a_term_of_a_sum_is_refused_by_name(world):
    term = DTensor.from_local(torch.zeros(3, 3), world.four, [Partial()], run_check=False)
    for kind in (Lion, Tiger, Amos):
        with pytest.raises(ValueError, match=r"parameter w of group 0 is placed as .*accepted are Shard and Replicate"):
            kind([("w", nn.Parameter(term))])


def check_a_compiled_step_of_cut_parameters_is_the_eager_one(world):
    if world.rank > 1:
        return
    for kind in (Lion, Tiger, Amos):
        made = []
        for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
            params = [nn.Parameter(cut_over(world.pair)(gaussian(5, 7), dim)) for dim in (0, 1)]
            optimizer = kind(params, lr=torch.tensor(0.1))
            step = wrap(optimizer.step)
            for seed in range(2):
                for dim, parameter in enumerate(params):
                    parameter.grad = cut_over(world.pair)(gaussian(5, 7, seed=seed), dim)
                step()
            made.append(torch.cat([parameter.to_local().flatten() for parameter in params]))
        torch.testing.assert_close(*made, rtol=0, atol=1e-14)


def check_a_whole_state_of_amos_is_cut_and_a_cut_one_made_whole(world):
    cut, whole = nn.Parameter(cut_over(world.four)(gaussian(5, 3), 0)), nn.Parameter(gaussian(5, 3))
    optimizers = [Amos([cut], momentum=0.9), Amos([whole], momentum=0.9)]
    cut.grad, whole.grad = cut_over(world.four)(gaussian(5, 3, seed=1), 0), gaussian(5, 3, seed=1)
    for optimizer in optimizers:
        optimizer.step()
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    before = dict(optimizers[1].state[whole])
    optimizers[0].load_state_dict(states[1])
    optimizers[1].load_state_dict(states[0])
    for slot, expected in before.items():
        torch.testing.assert_close(optimizers[1].state[whole][slot], expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(full(optimizers[0].state[cut][slot]), expected, rtol=0, atol=1e-14)
    assert optimizers[0].state[cut]["decay"].placements == (Shard(0),)


def check_rounding_draws_the_same_however_a_parameter_is_cut(world):
    for shape, dim in (((10, 6), 0), ((6, 10), 1), ((7,), 0)):
        for rounding in ("stochastic", "compensated"):
            whole = nn.Parameter(gaussian(*shape).bfloat16())
            cut = nn.Parameter(placed(whole.detach().clone(), world.four, [Shard(dim)]))
            for parameter in (whole, cut):
                optimizer = Lion([parameter], lr=1e-3, rounding=rounding)
                for seed in range(3):
                    grad = gaussian(*shape, seed=seed).bfloat16()
                    parameter.grad = grad if parameter is whole else placed(grad, world.four, [Shard(dim)])
                    optimizer.step()
            assert torch.equal(cut.full_tensor(), whole.detach()), (shape, dim, rounding)


def check_a_shard_without_a_gradient_counts_as_zero_in_tiger_and_amos(world):
    for make in (KINDS["Tiger"], KINDS["Amos"]):
        whole, cut = nn.Parameter(gaussian(8, 6)), nn.Parameter(placed(gaussian(8, 6), world.four, [Shard(0)]))
        for parameter in (whole, cut):
            grad = gaussian(8, 6, seed=1)
            grad[:2] = 0.0  # what the first process holds
            optimizer = make([{"params": [parameter], "role": "conv"}])
            if parameter is whole:
                parameter.grad = grad
            elif world.rank:
                parameter.grad = placed(grad, world.four, [Shard(0)])
            optimizer.step()
        torch.testing.assert_close(cut.full_tensor(), whole.detach(), rtol=0, atol=1e-11)
