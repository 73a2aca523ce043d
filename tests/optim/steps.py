"""What the tests of Muon share."""

import torch
from torch import nn

from danlu.optim import Muon, shape_scale


def step(optimizer, *gradients):
    """Give the optimizer's parameters these gradients and take one step."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(params, gradients):
        parameter.grad = gradient.clone()
    optimizer.step()


def one_step(gradient, weight=None, *, steps=1, **options):
    """Return what one parameter became after ``steps`` steps along one gradient from ``weight`` (default zero)."""
    parameter = nn.Parameter(torch.zeros_like(gradient) if weight is None else weight.clone())
    if weight is None:
        options.setdefault("weight_decay", 0.0)
    optimizer = Muon([parameter], **{"lr": 1.0, **options})
    for _ in range(steps):
        step(optimizer, gradient)
    return parameter.detach()


def muon_reference(W, gradients, *, lr, momentum, nesterov=True, weight_decay=0.0, scale="plain", ema=True):
    """Return what Muon makes of one matrix: its definition, with the polar factor of a singular value decomposition."""
    M = torch.zeros_like(W)
    for G in gradients:
        weight = 1 - momentum if ema else 1
        M = momentum * M + weight * G
        direction = momentum * M + weight * G if nesterov else M
        U, _, Vh = torch.linalg.svd(direction, full_matrices=False)
        update = U @ Vh
        if scale == "rms":
            update = update * 0.2 / update.square().mean().sqrt()
        else:
            update = update * shape_scale(scale, *W.shape)
        W = (1 - lr * weight_decay) * W - lr * update
    return W
