"""What the tests of Muon share."""

import torch
from torch import nn

from danlu.optim import Muon


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
