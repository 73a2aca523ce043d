"""What a HiPPO state remembers: run the recurrence over a signal and draw the past from the last state."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from danlu._validate import choice, integer
from danlu.nn.ssm.discretize import HistoryMethod, Method, discretize, exact_step, history_step
from danlu.nn.ssm.hippo import fourier_history, fourier_window, legendre, legs, legt

Memory = Literal["legs", "legt", "fourier-window", "fourier-history"]


def _last_of_history(u: Tensor, A: Tensor, B: Tensor, first: Tensor, method: HistoryMethod) -> Tensor:
    """State after the whole signal, from the projection of a constant at the first sample."""
    x = first * u[0]
    if method == "exact":
        k = torch.arange(1, len(u), dtype=torch.float64)
        for block, inputs in zip(k.split(256), u[1:].split(256)):  # exponentials of many steps at a time
            for transition, gain, u_k in zip(*exact_step(A, B, (1 / block).log1p()), inputs):
                x = transition @ x + gain * u_k
        return x
    for k_, u_k in enumerate(u[1:], start=1):
        transition, gain = history_step(A, B, k_, method=method)
        x = transition @ x + gain * u_k
    return x


def _last_of_window(u: Tensor, A: Tensor, B: Tensor, step: float, method: Method) -> Tensor:
    transition, gain = discretize(A, B, step, method=method)
    x = torch.zeros_like(gain)
    for u_k in u:
        x = transition @ x + gain * u_k
    return x


def reconstruct(
    signal: Tensor,
    order: int,
    *,
    memory: Memory = "legs",
    method: Method | HistoryMethod = "exact",
    window: int | None = None,
    midpoint: bool = False,
) -> Tensor:
    """Read a signal sample by sample into a state of ``order`` numbers, then draw it from that state alone.

    Args:
        signal: ``(samples,)``, held constant from one sample to the next; computed in float64.
        order: coefficients of the Legendre memories, harmonics N of the Fourier ones (``2N + 1`` coefficients).
        memory: ``legs`` and ``fourier-history`` keep everything so far, ``legt`` and ``fourier-window`` the last
            ``window`` samples.
        method: ``exact``; for the windows also ``forward``, ``backward`` or ``bilinear``, for the histories
            ``bilinear`` or ``bilinear-post`` (see `danlu.nn.ssm.discretize`).
        window: samples that a window holds; None: all of them.
        midpoint: for the Fourier window, the uncorrected system (see `danlu.nn.ssm.fourier_window`).

    Returns:
        float64 ``(samples,)`` or ``(window,)``: the remembered signal in the middle of each sample's interval.

    Raises:
        ValueError: no sample, a window longer than the signal or one for a history, an unknown memory or method.

    >>> t = torch.linspace(0, 1, 200)
    >>> error = reconstruct((6 * t).sin(), 12) - (6 * t).sin()
    >>> bool(error.square().mean().sqrt() < 0.01)
    True
    """
    if signal.dim() != 1 or not len(signal) or signal.is_complex():
        raise ValueError(f"signal must be real, (samples,), got {signal.dtype} of shape {tuple(signal.shape)}")
    integer("order", order)
    choice("memory", memory, get_args(Memory))
    moving = memory in ("legt", "fourier-window")
    if not moving and window is not None:
        raise ValueError(f"window must be None for {memory!r}, which keeps the whole history, got {window}")
    if midpoint and memory != "fourier-window":
        raise ValueError(f"midpoint belongs to 'fourier-window', got it for {memory!r}")
    if window is not None:
        integer("window", window, high=len(signal))
    u, size = signal.double(), len(signal) if window is None else window
    fourier = memory.startswith("fourier")
    if moving:
        choice("method", method, get_args(Method))
        A, B = fourier_window(order, midpoint=midpoint) if fourier else legt(order)
        x = _last_of_window(u.to(A.dtype), A, B, 1 / size, method)  # type: ignore[arg-type]
    else:
        choice("method", method, get_args(HistoryMethod))
        A, B = fourier_history(order) if fourier else legs(order)
        first = torch.zeros_like(B)
        first[order if fourier else 0] = 1.0 if fourier else math.sqrt(2)
        x = _last_of_history(u.to(A.dtype), A, B, first, method)  # type: ignore[arg-type]
    s = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    if not fourier:
        return legendre(order, 2 * s - 1) @ x
    n = torch.arange(-order, order + 1, dtype=torch.float64)
    drawn: Tensor = (torch.exp(2j * math.pi * s[:, None] * n) @ x).real
    return drawn
