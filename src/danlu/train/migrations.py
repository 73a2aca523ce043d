"""Training state of earlier releases in today's form."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from danlu.optim import merged_state_dicts

__all__ = ["upgraded_state"]

_RENAMED = {"tokens": "items", "tokens_per_second": "items_per_second"}


def upgraded_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of a checkpoint as :meth:`danlu.train.trainer.Trainer.state_dict` writes it today.

    Release 0.1 kept one optimizer and one scheduler for each rule, called what the loss is divided by tokens, and
    grouped the parameters of copied modules otherwise than today: they are sorted into today's groups by name.

    Args:
        state: of a checkpoint.
        optimizer: whose groups the state is for.
    """
    if "optimizers" not in state:
        return dict(state)
    old = dict(state)
    record, items, schedules = old.pop("unevaluated"), old.pop("tokens"), old.pop("schedules")
    merged = merged_state_dicts(old.pop("optimizers"))
    rates = {key: [value for part in schedules for value in part[key]] for key in ("base_lrs", "_last_lr")}
    merged, places = _sorted(merged, optimizer)
    return {
        **old,
        "unevaluated": None if record is None else {_RENAMED.get(key, key): value for key, value in record.items()},
        "items": items,
        "length": None,
        "optimizer": merged,
        "schedule": {
            **schedules[0],
            **{key: [values[place] for place in places] for key, values in rates.items()},
            "lr_lambdas": [None] * len(places),
        },
    }


def _sorted(merged: dict[str, Any], optimizer: Optimizer) -> tuple[dict[str, Any], list[int]]:
    """The state with the groups that the optimizer has, and which of the old groups each takes its options from."""
    old, groups = merged["param_groups"], optimizer.param_groups
    names = [group.get("param_names", []) for group in groups]
    if [len(group["params"]) for group in old] == [len(group["params"]) for group in groups]:
        return merged, list(range(len(old)))
    homes = {name: place for place, group in enumerate(old) for name in group.get("param_names", [])}
    keys = {name: key for group in old for name, key in zip(group.get("param_names", []), group["params"])}
    if not all(mine and set(mine) <= homes.keys() for mine in names):
        return merged, list(range(len(old)))  # the optimizer says what does not fit
    places = [homes[mine[0]] for mine in names]
    numbers = {name: number for number, name in enumerate(name for mine in names for name in mine)}
    return {
        "state": {numbers[name]: merged["state"][key] for name, key in keys.items() if key in merged["state"]},
        "param_groups": [
            {**old[place], "params": [numbers[name] for name in mine], "param_names": mine}
            for place, mine in zip(places, names)
        ],
    }, places
