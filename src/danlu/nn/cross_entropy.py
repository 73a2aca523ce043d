"""Cross-entropy of a linear head that never holds the logits of more than one chunk of tokens.

The gradient of the summed loss with respect to the logits is ``softmax - one_hot``, known as soon as the logits are:
each chunk's contribution to both gradients is formed while its logits are in cache, and the backward pass only scales
them. Same products as the plain computation, no logits kept.

With a ``z_loss`` the square of the log-sum-exp is added in the same pass: for a token with logits ``l`` and
``log Z = log sum exp(l)`` its gradient is ``2 z_loss log Z softmax(l)``, a factor on the softmax that is there anyway.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu._autograd import Fused, device_type, ordinary
from danlu._validate import integer, number
from danlu.protocols import IGNORE

_IN_CACHE = 1 << 19
"""Logits of which a float32 copy stays in the cache of two cores."""


class _LinearCrossEntropy(Fused):
    products = True
    compiled = True

    @staticmethod
    def plain(x_nd: Tensor, w_vd: Tensor, targets_n: Tensor, chunk: int, z_loss: float) -> Tensor:
        wide = torch.promote_types(x_nd.dtype, torch.float32)
        logits_nv = F.linear(x_nd, w_vd.to(x_nd.dtype)).to(wide)
        loss = F.cross_entropy(logits_nv, targets_n, ignore_index=IGNORE, reduction="sum")
        if z_loss:
            loss = loss + z_loss * (logits_nv.logsumexp(-1).square() * (targets_n != IGNORE)).sum()
        return loss

    @staticmethod
    def fast(
        ctx: Any, x_nd: Tensor, w_vd: Tensor, targets_n: Tensor, chunk: int, z_loss: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        needs_x, needs_w, *_ = ctx.needs
        head_vd = w_vd.to(x_nd.dtype)
        wide = torch.promote_types(x_nd.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x_nd.device)
        grad_x = torch.empty_like(x_nd) if needs_x else None
        grad_w = torch.zeros_like(w_vd) if needs_w else None
        for start in range(0, x_nd.shape[0], chunk):
            x_cd, target_c = x_nd[start : start + chunk], targets_n[start : start + chunk]
            valid_c = target_c != IGNORE
            logits_cv = x_cd @ head_vd.T
            losses_c = _losses(logits_cv, target_c.where(valid_c, 0), z_loss, gradient=needs_x or needs_w)
            loss += (losses_c * valid_c).sum()
            if not (needs_x or needs_w):
                continue
            grad_cv = logits_cv  # made into it
            # Looking first saves a pass over the logits, where looking does not wait for a device.
            looks = x_nd.device.type == "cpu" and not torch.compiler.is_compiling()
            if not (looks and bool(valid_c.all())):
                grad_cv *= valid_c[:, None]
            if grad_x is not None:
                torch.mm(grad_cv, head_vd, out=grad_x[start : start + chunk])
            if grad_w is not None:
                if grad_w.dtype == x_nd.dtype:
                    grad_w.addmm_(grad_cv.T, x_cd)
                else:
                    grad_w += grad_cv.T @ x_cd
        return loss, grad_x, grad_w

    @staticmethod
    def derivative(ctx: Any, grad: Tensor, inputs: Sequence[Any], kept: Sequence[Tensor | None]) -> Sequence[Any]:
        # The factor is applied in float32: a loss scale of 65536 is infinite in float16.
        grads = [None if g is None else g.to(torch.promote_types(g.dtype, grad.dtype)).mul(grad) for g in kept]
        return *grads, None, None, None


def _losses(logits_cv: Tensor, target_c: Tensor, z_loss: float, *, gradient: bool) -> Tensor:
    """Losses ``(C,)`` in float32 or better; the logits are turned into their gradient in place if that is asked for.

    On a CPU a few rows at a time, whose float32 copies stay in the cache.
    """
    rows, vocab = logits_cv.shape
    whole = torch.compiler.is_compiling() or device_type(logits_cv) != "cpu"
    step = rows if whole else max(1, _IN_CACHE // vocab)
    wide = torch.promote_types(logits_cv.dtype, torch.float32)
    found = []
    for logits_rv, target_r in zip(logits_cv.split(step), target_c.split(step)):
        target_r1 = target_r[:, None]
        wide_rv = logits_rv.to(wide)
        right_r = wide_rv.gather(1, target_r1)[:, 0]
        if not gradient:
            log_z_r = wide_rv.logsumexp(-1)
            found.append(_with_square(log_z_r, z_loss) - right_r)
            continue
        p_rv = wide_rv.softmax(-1)
        # The likeliest token's probability is never small, so that the sum of exponentials comes from it unharmed.
        log_z_r = wide_rv.amax(-1) - p_rv.amax(-1).log()
        found.append(_with_square(log_z_r, z_loss) - right_r)
        if z_loss:
            p_rv *= (1 + 2 * z_loss * log_z_r)[:, None]
        logits_rv.copy_(p_rv.scatter_add_(1, target_r1, p_rv.new_full((), -1.0).expand(target_r1.shape)))
    return torch.cat(found)


def _with_square(log_z: Tensor, z_loss: float) -> Tensor:
    return torch.addcmul(log_z, log_z, log_z, value=z_loss) if z_loss else log_z


def linear_cross_entropy(
    x: Tensor, weight_vd: Tensor, targets: Tensor, *, chunk: int = 512, z_loss: float = 0.0
) -> Tensor:
    """``sum over tokens of -log softmax(x W^T)[target]``, in float32 (float64 for float64).

    Args:
        x: hidden states ``(..., dim)``.
        weight_vd: head ``(vocab, dim)``; cast to the dtype of ``x`` for the product.
        targets: int64 ``(...)``; -100 marks a token without loss.
        chunk: tokens whose logits are formed together; memory is ``chunk * vocab``.
        z_loss: factor on the sum of ``log^2 Z`` that is added, ``Z`` being the sum of a token's exponentiated logits
            (PaLM, arXiv 2204.02311, section 5).

    Returns:
        Tensor ``()``. Differentiable any number of times in ``x`` and ``weight_vd``, from the second time on with all
        logits in memory. Under ``torch.autocast`` the products are computed in its dtype.

    Raises:
        IndexError: a target outside of the vocabulary, on a CPU; on a GPU the device stops, as in torch.
        ValueError: shapes that do not match, or a negative factor.

    >>> x, w = torch.randn(2, 3, 4), torch.randn(7, 4)
    >>> targets = torch.tensor([[0, 6, -100], [1, 2, 3]])
    >>> plain = torch.nn.functional.cross_entropy((x @ w.T).flatten(0, 1), targets.flatten(), reduction="sum")
    >>> torch.allclose(linear_cross_entropy(x, w, targets, chunk=2), plain, atol=1e-5)
    True
    """
    integer("chunk", chunk)
    number("z_loss", z_loss, low=0)
    if x.shape[:-1] != targets.shape or x.shape[-1] != weight_vd.shape[-1]:
        raise ValueError(
            f"x (..., dim), weight (vocab, dim) and targets (...) must fit together, got {tuple(x.shape)}, "
            f"{tuple(weight_vd.shape)} and {tuple(targets.shape)}"
        )
    rows_nd = x.reshape(-1, x.shape[-1])
    targets_n = targets.reshape(-1)
    # A GPU's kernels look for themselves, without anybody waiting for them.
    if ordinary(rows_nd, targets_n) and targets_n.device.type == "cpu":
        _check(targets_n, weight_vd.shape[0])
    return _LinearCrossEntropy.of(rows_nd, weight_vd, targets_n, chunk, z_loss)


def _check(targets_n: Tensor, vocab: int) -> None:
    wrong_n = (targets_n < 0) & (targets_n != IGNORE) | (targets_n >= vocab)
    if wrong_n.any():
        value = targets_n[wrong_n][0].item()
        raise IndexError(f"targets must be in [0, {vocab}), or {IGNORE} for a token without loss, got {value}")
