"""The weight decays that Muon offers: of all singular values, of the largest, and of those above a bound."""

from typing import Any

from torch import Tensor

from danlu._validate import choice, positive
from danlu.linalg import clipped_decay_, spectral_decay_

DECAYS = ("decoupled", "spectral", "clipped")


def check_decay(where: str, kind: Any, bound: Any) -> None:
    """Raise unless ``kind`` is a decay, with a bound exactly where it needs one; ``where`` begins the message."""
    choice(f"{where}decay", kind, DECAYS)
    if kind == "clipped":
        positive(f"{where}decay_bound", bound)
    elif bound is not None:
        raise ValueError(f"{where}decay_bound belongs to decay='clipped', got {bound!r} with decay={kind!r}")


def decay_(W: Tensor, amount: float, kind: str = "decoupled", bound: float | None = None) -> None:
    """Shrink singular values of ``W`` in place.

    ``decoupled``: all of them, by ``1 - amount``. ``spectral``: the largest only, as far as ten power iterations find
    it, which repeated lowers the spectrum like a falling water level (`danlu.linalg.spectral_decay_`). ``clipped``:
    what they have above ``bound``, by ``1 - amount`` (`danlu.linalg.clipped_decay_`).

    Args:
        W: ``(…, m, n)``, real floating, finite. The last two kinds read a result from the device.
        amount: learning rate times decay, at most 1.
        kind: as above.
        bound: of ``clipped``, in the units of the singular values.

    >>> import torch
    >>> W = torch.diag(torch.tensor([3.0, 0.5]))
    >>> decay_(W, 0.5, "clipped", bound=1.0)
    >>> W
    tensor([[2.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    check_decay("", kind, bound)
    if kind == "spectral":
        spectral_decay_(W, amount)
    elif bound is not None:
        clipped_decay_(W, amount, bound)
    else:
        W.mul_(1.0 - amount)
