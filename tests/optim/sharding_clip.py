"""Checks of clipping and of the guard against gradients that are not finite, on four processes."""

import pytest
import torch
from sharding_world import ZOO, cut_over, full, here
from tensors import gaussian
from torch import nn

from danlu.optim import NonFiniteGuard, clip_grad_norm_, grad_norm


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
