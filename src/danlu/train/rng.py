"""The global random generators of a process (Python, NumPy, PyTorch) as tensors and plain values."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["restore", "seed_all", "snapshot"]


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what libraries draw from unasked
    torch.manual_seed(seed)


def snapshot() -> dict[str, Any]:
    """Return the state of every global generator.

    >>> before = snapshot()
    >>> first = torch.rand(2), random.random()
    >>> restore(before)
    >>> torch.equal(torch.rand(2), first[0]), random.random() == first[1]
    (True, True)
    """
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: Mapping[str, Any]) -> None:
    """Put every global generator back into the state of :func:`snapshot`."""
    random.setstate(state["python"])
    kept = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": "MT19937",
            "state": {"key": kept["key"].numpy().astype(np.uint32), "pos": kept["pos"]},
            "has_gauss": kept["has_gauss"],
            "gauss": kept["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
