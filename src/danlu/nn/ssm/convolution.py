"""Causal convolution by the fast Fourier transform: linear-logarithmic in the length.

Shape suffixes: b batch, h channels, t time, f frequencies.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from danlu._autograd import Fused

_BLOCK = 1 << 18
"""Padded numbers transformed at a time on a CPU: their spectra then stay in its second-level cache."""


def fast_length(least: int) -> int:
    """Smallest number ``2^a 3^b 5^c`` that is at least ``least``: transforms of such lengths are the fast ones.

    >>> [fast_length(n) for n in (1, 7, 11, 2047)]
    [1, 8, 12, 2048]
    """
    best = 1 << max(least - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            candidate = three << max(-(-least // three) - 1, 0).bit_length()
            best = min(best, candidate)
            three *= 3
        five *= 5
    return best


def _slices(u_bht: Tensor, size: int) -> list[slice]:
    """Channels in groups whose padded rows fill `_BLOCK`; all of them at once on a GPU."""
    channels = u_bht.shape[-2]
    rows = u_bht.numel() // max(channels * u_bht.shape[-1], 1)
    step = max(_BLOCK // (rows * size), 1) if u_bht.device.type == "cpu" and rows else channels
    return [slice(first, first + step) for first in range(0, channels, step)]


class _Convolution(Fused):
    """Keeps both spectra: three real transforms backward, where torch takes complex ones of full length."""

    @staticmethod
    def plain(u_bht: Tensor, k_ht: Tensor, size: int) -> Tensor:
        if u_bht.numel() == 0:  # MKL has no transform of no rows
            return u_bht * k_ht
        product = torch.fft.rfft(u_bht, n=size) * torch.fft.rfft(k_ht, n=size)
        y: Tensor = torch.fft.irfft(product, n=size)[..., : u_bht.shape[-1]]
        return y

    @staticmethod
    def fast(_: Any, u_bht: Tensor, k_ht: Tensor, size: int) -> tuple[Tensor, ...]:
        y, spectra = torch.empty_like(u_bht), []
        for part in _slices(u_bht, size):
            u_bhf, k_hf = torch.fft.rfft(u_bht[..., part, :], n=size), torch.fft.rfft(k_ht[part], n=size)
            y[..., part, :] = torch.fft.irfft(u_bhf * k_hf, n=size)[..., : u_bht.shape[-1]]
            spectra += [u_bhf, k_hf]
        return y, *spectra

    @staticmethod
    def derivative(
        ctx: Any, grad_bht: Tensor, inputs: Sequence[Any], kept: Sequence[Tensor]
    ) -> tuple[Tensor | None, Tensor | None, None]:
        u_bht, _, size = inputs
        grads = [
            _gradients(ctx.needs, grad_bht[..., part, :], u_bhf, k_hf, size)
            for part, u_bhf, k_hf in zip(_slices(u_bht, size), kept[::2], kept[1::2])
        ]
        grad_u, grad_k = (None if g[0] is None else g[0] if len(g) == 1 else torch.cat(g, -2) for g in zip(*grads))
        return grad_u, grad_k, None


def _gradients(
    needs: Sequence[bool], grad_bht: Tensor, u_bhf: Tensor, k_hf: Tensor, size: int
) -> tuple[Tensor | None, Tensor | None]:
    time = grad_bht.shape[-1]
    grad_bhf = torch.fft.rfft(grad_bht, n=size)
    grad_u = grad_k = None
    if needs[0]:
        grad_u = torch.fft.irfft(grad_bhf * k_hf.conj(), n=size)[..., :time]
    if needs[1]:
        both = (grad_bhf * u_bhf.conj()).sum_to_size(k_hf.shape)
        grad_k = torch.fft.irfft(both, n=size)[..., :time]
    return grad_u, grad_k


def causal_convolution(u_bht: Tensor, k_ht: Tensor) -> Tensor:
    r"""``y_t = sum_{s <= t} k_{t-s} u_s`` for every channel, in ``O(T log T)``.

    Computed in float32 for 16-bit dtypes (they have no transform), in the input's dtype otherwise; the result
    has the dtype of ``u``. Differentiable any number of times. A value that is not finite spoils its own row and
    channel only, but there also what comes before it.

    Args:
        u_bht: ``(..., channels, time)``.
        k_ht: ``(channels, time)``, the kernel.

    Raises:
        ValueError: the shapes do not fit.

    >>> u, k = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0, 100.0]])
    >>> causal_convolution(u, k).round()
    tensor([[  1.,  12., 123.]])
    """
    if k_ht.dim() != 2 or u_bht.shape[-2:] != k_ht.shape:
        raise ValueError(
            f"u must be (..., channels, time) and k (channels, time), got {tuple(u_bht.shape)}, {tuple(k_ht.shape)}"
        )
    wide = torch.promote_types(u_bht.dtype, torch.float32)
    u, k = u_bht.to(wide), k_ht.to(wide)
    size = fast_length(max(2 * u.shape[-1] - 1, 2))
    return _Convolution.of(u, k, size, by_hand=torch.is_grad_enabled()).to(u_bht.dtype)
