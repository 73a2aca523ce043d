"""The weight decays that Muon offers: of all singular values, of the largest, and of those above a bound."""

from typing import Any

import torch
from torch import Tensor

from danlu._validate import choice, number, positive
from danlu.linalg import mclip, spectral_norm

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
    it, which repeated lowers the spectrum like a falling water level (`danlu.optim.spectral_decay_`). ``clipped``:
    what they have above ``bound``, by ``1 - amount`` (`danlu.optim.clipped_decay_`).

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


@torch.no_grad()
def spectral_decay_(
    W: Tensor, amount: float, *, start: Tensor | None = None, iterations: int = 10, block: int = 1
) -> Tensor:
    """Decay only the largest singular value: ``W <- W - amount (W v) v^T``, in place; return the next ``start``.

    This is decoupled weight decay for half the squared spectral norm, with ``amount`` the learning rate times the
    decay. It never increases a singular value, converged or not, and repeated it lowers the spectrum like a falling
    water level: ``sigma_i(t) = min(sigma_i(0), L(t))``, where ``dL/dt = -L / p`` while p values stand at the level and
    t is the sum of the amounts.

    Args:
        W: ``(…, m, n)``, real floating, changed in place.
        amount: in [0, 2].
        start, iterations, block: as in `danlu.linalg.spectral_norm`.

    Sources: Su, "Thoughts from spectral norm gradient to a new kind of weight decay" (2024).

    >>> import torch
    >>> W = torch.diag(torch.tensor([2.0, 1.0]))
    >>> v = spectral_decay_(W, 0.25, iterations=30)
    >>> W.round(decimals=6) + 0.0
    tensor([[1.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    number("amount", amount, low=0, high=2)
    top = spectral_norm(W, start=start, iterations=iterations, block=block)
    right = top.right.unsqueeze(-1)
    W.sub_((W @ right) @ right.mT, alpha=amount)
    return top.start


@torch.no_grad()
def clipped_decay_(W: Tensor, amount: float, bound: float) -> Tensor:
    """Decay only what is above ``bound``: ``W <- (1 - amount) W + amount mclip(W, high=bound)``, in place.

    With updates of spectral norm at most eta in between, it keeps the spectral norm of ``W`` below ``bound + eta /
    amount`` right after an update and ``bound + (1 - amount) eta / amount`` right after the decay. It leaves singular
    values below ``bound`` alone.

    Args:
        W: ``(…, m, n)``, real floating, changed in place and returned.
        amount: in [0, 1].
        bound: where decay begins, above 0.

    Sources: Cesista, "Numerically stable spectral clipping via Newton-Schulz" (2025).

    >>> import torch
    >>> clipped_decay_(torch.diag(torch.tensor([3.0, 0.5])), 0.5, 1.0)
    tensor([[2.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    number("amount", amount, low=0, high=1)
    positive("bound", bound)
    return W.lerp_(mclip(W, high=bound, low=0.0), amount)
