"""State of release 0.1 in today's form."""

import copy

import torch
from torch import nn

from danlu.train.migrations import upgraded_state


def optimizer(*sizes: int) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(1)) for _ in range(size)]} for size in sizes]
    return torch.optim.SGD(groups, lr=0.1)


OLD = {
    "step": 3,
    "tokens": 96,
    "unevaluated": {"step": 3, "loss": 2.0, "tokens": 96, "tokens_per_second": 7.5},
    "optimizers": [
        {"state": {0: {"momentum_buffer": "m"}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        {"state": {1: {"exp_avg": "a"}}, "param_groups": [{"lr": 0.2, "params": [0]}, {"lr": 0.3, "params": [1]}]},
    ],
    "schedules": [
        {"base_lrs": [0.1], "_last_lr": [0.05], "lr_lambdas": [None], "last_epoch": 3},
        {"base_lrs": [0.2, 0.3], "_last_lr": [0.1, 0.15], "lr_lambdas": [None, None], "last_epoch": 3},
    ],
}


def test_two_optimizers_and_their_schedules_become_one_and_tokens_become_items() -> None:
    new = upgraded_state(copy.deepcopy(OLD), optimizer(1, 1, 1))
    assert new["items"] == 96
    assert new["unevaluated"] == {"step": 3, "loss": 2.0, "items": 96, "items_per_second": 7.5}
    assert [group["params"] for group in new["optimizer"]["param_groups"]] == [[0], [1], [2]]
    assert new["optimizer"]["state"] == {0: {"momentum_buffer": "m"}, 2: {"exp_avg": "a"}}
    assert new["schedule"] == {
        "base_lrs": [0.1, 0.2, 0.3],
        "_last_lr": [0.05, 0.1, 0.15],
        "lr_lambdas": [None, None, None],
        "last_epoch": 3,
    }
    assert not {"tokens", "optimizers", "schedules"} & new.keys()


def test_state_of_today_is_left_as_it_is() -> None:
    new = upgraded_state(copy.deepcopy(OLD), optimizer(1, 1, 1))
    assert upgraded_state(new, optimizer(1, 1, 1)) == new


def test_parameters_that_are_grouped_otherwise_today_are_found_by_their_names() -> None:
    old = copy.deepcopy(OLD)
    names = [["a"], ["b"], ["c"]]
    for group, mine in zip([g for part in old["optimizers"] for g in part["param_groups"]], names, strict=True):
        group["param_names"] = mine
    today = torch.optim.SGD(
        [
            {"params": [("c", nn.Parameter(torch.zeros(1))), ("a", nn.Parameter(torch.zeros(1)))]},
            {"params": [("b", nn.Parameter(torch.zeros(1)))]},
        ],
        lr=0.1,
    )
    new = upgraded_state(old, today)
    assert [(group["lr"], group["params"]) for group in new["optimizer"]["param_groups"]] == [(0.3, [0, 1]), (0.2, [2])]
    assert new["optimizer"]["state"] == {0: {"exp_avg": "a"}, 1: {"momentum_buffer": "m"}}
    assert new["schedule"]["base_lrs"] == [0.3, 0.2]
