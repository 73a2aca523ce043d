"""Cross-entropy of a linear head that never holds the logits of more than one chunk of tokens.

The gradient of the summed loss with respect to the logits is ``softmax - one_hot``, known as soon as the logits are:
each chunk's contribution to both gradients is formed while its logits are in cache, and the backward pass only scales
them. Same products as the plain computation, no logits kept.
"""

from typing import Any

import torch
from torch import Tensor

from danlu._validate import integer

IGNORE = -100


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, w_vd: Tensor, targets_n: Tensor, chunk: int) -> Tensor:
        needs_x, needs_w, *_ = ctx.needs_input_grad
        head_vd = w_vd.to(x_nd.dtype)
        wide = torch.promote_types(x_nd.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x_nd.device)
        grad_x = torch.empty_like(x_nd) if needs_x else None
        grad_w = torch.zeros_like(w_vd) if needs_w else None
        for start in range(0, x_nd.shape[0], chunk):
            x_cd, target_c = x_nd[start : start + chunk], targets_n[start : start + chunk]
            valid_c = target_c != IGNORE
            safe_c1 = target_c.clamp_min(0)[:, None]
            logits_cv = (x_cd @ head_vd.T).to(wide)
            norm_c = logits_cv.logsumexp(-1)
            loss += ((norm_c - logits_cv.gather(1, safe_c1)[:, 0]) * valid_c).sum()
            if not (needs_x or needs_w):
                continue
            grad_cv = logits_cv.sub_(norm_c[:, None]).exp_()
            grad_cv.scatter_add_(1, safe_c1, grad_cv.new_full((), -1.0).expand(safe_c1.shape))
            # Looking first saves a pass over the logits, where looking does not wait for a device.
            if x_nd.device.type != "cpu" or not bool(valid_c.all()):
                grad_cv *= valid_c[:, None]
            grad_cv = grad_cv.to(x_nd.dtype)
            if grad_x is not None:
                torch.mm(grad_cv, head_vd, out=grad_x[start : start + chunk])
            if grad_w is not None:
                if grad_w.dtype == x_nd.dtype:
                    grad_w.addmm_(grad_cv.T, x_cd)
                else:
                    grad_w += grad_cv.T @ x_cd
        ctx.save_for_backward(grad_x, grad_w)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x, grad_w = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad.to(grad_x.dtype),
            None if grad_w is None else grad_w * grad.to(grad_w.dtype),
            None,
            None,
        )


def linear_cross_entropy(x: Tensor, weight_vd: Tensor, targets: Tensor, *, chunk: int = 512) -> Tensor:
    """``sum over tokens of -log softmax(x W^T)[target]``, in float32 (float64 for float64).

    Args:
        x: hidden states ``(..., dim)``.
        weight_vd: head ``(vocab, dim)``; cast to the dtype of ``x`` for the product.
        targets: int64 ``(...)``; -100 marks a token without loss.
        chunk: tokens whose logits are formed together; memory is ``chunk * vocab``.

    Returns:
        Tensor ``()``. Differentiable once in ``x`` and ``weight_vd``.

    Raises:
        ValueError: shapes that do not match.

    >>> x, w = torch.randn(2, 3, 4), torch.randn(7, 4)
    >>> targets = torch.tensor([[0, 6, -100], [1, 2, 3]])
    >>> plain = torch.nn.functional.cross_entropy((x @ w.T).flatten(0, 1), targets.flatten(), reduction="sum")
    >>> torch.allclose(linear_cross_entropy(x, w, targets, chunk=2), plain, atol=1e-5)
    True
    """
    integer("chunk", chunk)
    if x.shape[:-1] != targets.shape or x.shape[-1] != weight_vd.shape[-1]:
        raise ValueError(
            f"x (..., dim), weight (vocab, dim) and targets (...) must fit together, got {tuple(x.shape)}, "
            f"{tuple(weight_vd.shape)} and {tuple(targets.shape)}"
        )
    loss: Tensor = _LinearCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight_vd, targets.reshape(-1), chunk)
    return loss
