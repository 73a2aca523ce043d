r"""Upsample guidance: sampling at a multiple of the resolution at which a model was trained, without further training.

A noisy image averaged over s x s pixels has the same signal and noise divided by s, so it is a noisy small image at
the time ``tau`` at which the signal-to-noise ratio is :math:`s^2` times higher. The model was trained for such small
images: its prediction for the small image replaces the coarse part of its prediction for the large one:

.. math:: \tilde\epsilon = \epsilon(x_t, t) + \theta\, U[\epsilon(D x_t / \rho, \tau) / s - D \epsilon(x_t, t)]

with D the average over s x s pixels, U the repetition of each pixel and :math:`\rho = a_t / a_\tau`. In terms of the
denoised image the noise levels cancel, on every schedule. This is the form computed here:
:math:`\tilde x_0 = x_0(x_t, t) + \theta\, U[x_0(D x_t / \rho, \tau) - D x_0(x_t, t)]`.

Source: Hwang et al., arXiv:2404.01709; kexue.fm 10055, whose w is :math:`\theta - 1`.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from danlu._validate import integer, number
from danlu.diffusion.sampler import Denoiser
from danlu.diffusion.schedule import Schedule, aligned_time, broadcast

__all__ = ["upsample_guidance"]


def upsample_guidance(
    denoise: Denoiser, schedule: Schedule, factor: int, *, weight: float = 1.2, start: float = 0.0
) -> Denoiser:
    """Return a denoiser of images ``factor`` times as high and wide as those that ``denoise`` was trained for.

    It evaluates ``denoise`` twice: on the large image, and on its average at ``1 / factor^2`` of the cost. Use it with
    any sampler of `danlu.diffusion`, started from noise of the large size. Where the schedule has no noise level as low
    as that of the averaged image, the small image is evaluated at time 0. It works with convolutional networks; it may
    fail with a network whose positions depend on the image size.

    Args:
        denoise: ``(x, t) -> x0`` for ``x`` ``(b, c, h, w)`` and ``t`` ``(b,)``.
        schedule: the schedule on which ``denoise`` was trained.
        factor: s, at least 1; 1 changes nothing.
        weight: share of the coarse part that is replaced: 1 all of it, 0 none; a little more than 1 is best on pixels.
        start: there is no guidance at times below this, where there is little noise: 0 for pixels, 0.4 to 0.7 for the
            latents of an autoencoder, whose fine scales are not those of an image.

    Raises:
        ValueError: ``factor`` is not an integer of at least 1, ``weight`` is not finite, ``start`` is outside [0, 1].
            The returned denoiser raises it for a height or width that is not a multiple of ``factor``.

    >>> from danlu.diffusion import Cosine
    >>> guided = upsample_guidance(lambda x, t: torch.tanh(x), Cosine(), 2, weight=1.0)
    >>> guided(torch.randn(3, 1, 8, 8), torch.full((3,), 0.5)).shape
    torch.Size([3, 1, 8, 8])
    """
    integer("factor", factor)
    number("weight", weight)
    number("start", start, low=0, high=1)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[-1] % factor or x.shape[-2] % factor:
            raise ValueError(f"x must be (b, c, h, w) with h and w multiples of {factor}, got shape {tuple(x.shape)}")
        fine = denoise(x, t)
        if factor == 1 or weight == 0:
            return fine
        tau = aligned_time(schedule, t, factor)
        small = avg_pool2d(x, factor) * broadcast(_small_scale(schedule, t, tau, factor), x)
        correction = interpolate(denoise(small, tau) - avg_pool2d(fine, factor), scale_factor=factor)
        # Multiply by a share of zero instead of branching: a branch would wait for the device.
        return torch.addcmul(fine, broadcast((t >= start).to(x.dtype) * weight, x), correction)

    return guided


def _small_scale(schedule: Schedule, t: Tensor, tau: Tensor, factor: int) -> Tensor:
    """Return ``1 / rho``, the factor that brings the averaged image at ``t`` to the scale of a small one at ``tau``.

    It equals both ``a_tau / a`` and ``factor b_tau / b``; it is computed from the larger of a and b, which is not zero.
    """
    (a, b), (a_tau, b_tau) = schedule.coefficients(t), schedule.coefficients(tau)
    return torch.where(b > a, factor * b_tau / b, a_tau / a)
