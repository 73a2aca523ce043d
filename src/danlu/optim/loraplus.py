r"""LoRA+: the output-side factor of a low-rank adapter learns faster than the input-side one.

An adapter adds :math:`B A` to a weight, with A of shape (r, in) and B of shape (out, r). LoRA+ gives B the rate
:math:`\lambda \eta` and A the rate :math:`\eta`; nothing else changes (Hayou et al., "LoRA+", arXiv 2402.12354).
"""

import math
import warnings
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from danlu._roles import declared
from danlu._validate import choice, integer, number, positive

Group = dict[str, Any]

_ROLES = ("lora_A", "lora_B", "vector", "embedding")


def balanced_ratio(inputs: int, outputs: int, rank: int) -> float:
    r"""Return the ratio of rates at which both factors of an adapter lower the loss equally: (in/out) sqrt(out/rank).

    Under Adam a step lowers the loss by its rate times the 1-norm of the gradient. With factors of natural variance,
    Var(A) = 1/in and Var(B) = 1/rank, the 1-norms of the gradients of A and B stand in this ratio.

    Source: the argument of kexue.fm 10001, whose published form (in/out) sqrt(in/rank) is the same for square weights
    only: what is summed in the gradient of A has length ``outputs``.

    >>> round(balanced_ratio(768, 768, 8), 2), round(balanced_ratio(4096, 1024, 8), 2)
    (9.8, 45.25)
    """
    for name, value in (("inputs", inputs), ("outputs", outputs), ("rank", rank)):
        integer(name, value)
    return inputs / outputs * math.sqrt(outputs / rank)


def loraplus_groups(
    model: nn.Module,
    lr: float,
    ratio: float | Literal["auto"] = 16.0,
    *,
    embedding_lr: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[Group]:
    """Sort the trainable parameters of a model with low-rank adapters into the groups of LoRA+.

    Adapters are known by a part of their parameter's name, ``lora_A`` or ``lora_B`` (``lora_embedding_A``,
    ``lora_embedding_B`` on an embedding): those of `danlu.nn.apply_lora` and of PEFT.

    =================  ============================================  ================  ================
    role               parameters                                    learning rate     weight decay
    =================  ============================================  ================  ================
    ``lora_A``         input-side factors, other matrices            ``lr``            ``weight_decay``
    ``lora_B``         output-side factors                           ``ratio * lr``    ``weight_decay``
    ``vector``         biases, gains and whatever has one dimension  ``ratio * lr``    0
    ``embedding``      both factors on embeddings                    ``embedding_lr``  ``weight_decay``
    =================  ============================================  ================  ================

    Decoupled decay is multiplied by a group's learning rate: B decays ``ratio`` times as fast as A.

    Args:
        model: any module, adapters applied and the rest frozen.
        lr: learning rate of A.
        ratio: rate of B over that of A, at least 1; ``"auto"`` takes `balanced_ratio` of each layer (and 1 where that
            is below 1). 16 suits most fine-tuning; harder tasks want more, together with half the learning rate.
        embedding_lr: learning rate of adapters on embeddings.
        weight_decay: decoupled decay.

    Returns:
        Groups for ``torch.optim.AdamW`` or any other optimizer, each with ``params``, ``param_names``, ``role``,
        ``lr``, ``weight_decay`` and ``lr_factor``, its rate over ``lr``. Empty groups are left out. Hand the optimizer
        to `watch_ratio` to be warned of a schedule that does not keep the ratio.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no trainable output-side factor, a ratio below 1, or another option out of range.

    >>> from danlu.nn import LoRAConfig, apply_lora
    >>> model = apply_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoRAConfig(rank=2))
    >>> [(group["role"], len(group["params"]), group["lr"]) for group in loraplus_groups(model, 1e-3)]
    [('lora_A', 2, 0.001), ('lora_B', 2, 0.016)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    positive("lr", lr)
    number("embedding_lr", embedding_lr, low=0)
    number("weight_decay", weight_decay, low=0)
    if isinstance(ratio, str):
        choice("ratio", ratio, ("auto",))
    else:
        number("ratio", ratio, low=1)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    roles = {name: _role(name, p) for name, p in trainable.items()}
    if "lora_B" not in roles.values() and "embedding" not in roles.values():
        raise ValueError("model has no trainable parameter called lora_B; apply adapters first (danlu.nn.apply_lora)")
    every = dict(model.named_parameters())
    found: dict[tuple[str, float], Group] = {}
    for name, parameter in trainable.items():
        role, factor = roles[name], 1.0
        if role == "embedding":
            factor = embedding_lr / lr
        elif ratio != "auto" and role != "lora_A":
            factor = ratio
        elif role == "lora_B":
            other = every[name.replace("lora_B", "lora_A")]
            sizes = other[0].numel(), parameter.shape[0], other.shape[0]
            if declared(name, parameter).role == "experts":  # factors of one matrix after another
                sizes = other.shape[-1], parameter.shape[-2], other.shape[-2]
            factor = max(1.0, balanced_ratio(*sizes))
        if (role, factor) not in found:
            found[role, factor] = {
                "params": [],
                "param_names": [],
                "role": role,
                "lr": lr * factor,
                "lr_factor": factor,
                "weight_decay": 0.0 if role == "vector" else weight_decay,
            }
        found[role, factor]["params"].append(parameter)
        found[role, factor]["param_names"].append(name)
    return [found[key] for key in sorted(found, key=lambda key: (_ROLES.index(key[0]), key[1]))]


def _role(name: str, parameter: Tensor) -> str:
    parts = name.split(".")
    if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
        return "embedding"
    if parameter.ndim < 2:
        return "vector"
    if "lora_A" in parts or "lora_B" in parts:
        return "lora_B" if "lora_B" in parts else "lora_A"
    # The magnitudes of a convolution (DoRA) have its number of dimensions, and one extent.
    return "vector" if sum(size != 1 for size in parameter.shape) <= 1 else "lora_A"


def watch_ratio(optimizer: Optimizer) -> RemovableHandle:
    """Warn, once, at the first step whose learning rates no longer stand in the ratios of `loraplus_groups`.

    Schedules that multiply (``LambdaLR``, all of `danlu.optim.schedule`) keep the ratios. Those that add or that bound
    the learning rate from below by one absolute number for all groups (``CosineAnnealingLR`` with ``eta_min``,
    ``ReduceLROnPlateau`` with one ``min_lr``) do not: they let A and B end at the same learning rate.

    Returns:
        A handle whose ``remove()`` ends the watch.

    Raises:
        ValueError: the optimizer was not made from the groups of `loraplus_groups`.

    >>> import torch
    >>> from danlu.nn import apply_lora
    >>> optimizer = torch.optim.AdamW(loraplus_groups(apply_lora(nn.Sequential(nn.Linear(8, 8))), 1e-3))
    >>> handle = watch_ratio(optimizer)
    """
    if not all("lr_factor" in group for group in optimizer.param_groups):
        raise ValueError("optimizer must be made from the groups of loraplus_groups: a group has no lr_factor")
    warned = False

    def check(watched: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal warned
        rates = [group["lr"] / group["lr_factor"] for group in watched.param_groups if group.get("lr_factor")]
        if not warned and max(rates) - min(rates) > 1e-6 * max(rates):
            warned = True
            said = ", ".join(f"{group['role']} {float(group['lr']):.3g}" for group in watched.param_groups)
            warnings.warn(f"the learning rates no longer keep the ratio of LoRA+: {said}", stacklevel=2)

    return optimizer.register_step_pre_hook(check)
