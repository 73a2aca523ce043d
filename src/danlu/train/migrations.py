"""Training state of earlier releases in today's form."""

from collections.abc import Mapping
from typing import Any

from danlu.optim import merged_state_dicts

__all__ = ["upgraded_state"]

_RENAMED = {"tokens": "items", "tokens_per_second": "items_per_second"}


def upgraded_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a checkpoint as :meth:`danlu.train.trainer.Trainer.state_dict` writes it today.

    Release 0.1 kept one optimizer and one scheduler for each rule, and called what the loss is divided by tokens.
    """
    if "optimizers" not in state:
        return dict(state)
    old = dict(state)
    schedules = old.pop("schedules")
    joined = {
        key: [value for part in schedules for value in part[key]] for key in ("base_lrs", "_last_lr", "lr_lambdas")
    }
    record, optimizers, items = old.pop("unevaluated"), old.pop("optimizers"), old.pop("tokens")
    return {
        **old,
        "unevaluated": None if record is None else {_RENAMED.get(key, key): value for key, value in record.items()},
        "items": items,
        "length": None,
        "optimizer": merged_state_dicts(optimizers),
        "schedule": {**schedules[0], **joined},
    }
