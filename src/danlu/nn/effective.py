"""The matrix that a linear layer multiplies by, whatever a tool has made of the layer.

Some formulas need the matrix itself: the loss that forms logits in chunks, latent attention that moves a map to the
query. An adapter of PEFT, a layer quantized by torchao or PyTorch, a pruned or sharded one computes something else than
its ``weight`` says, or has none.
"""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from danlu.nn.linear import Linear
from danlu.nn.lora import LoRALinear


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer multiplies by its ``weight`` as it stands and does nothing else.

    >>> is_plain(Linear(3, 5)), is_plain(nn.Linear(3, 5, bias=True))
    (True, False)
    """
    if isinstance(layer, LoRALinear):
        return is_plain(layer.base)
    if not isinstance(layer, Linear) and type(layer) is not nn.Linear:
        return False
    if layer._parameters.get("bias") is not None or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    return not is_traceable_wrapper_subclass(layer.weight)


def effective_weight(layer: nn.Module, columns: int, *, like: Tensor) -> Tensor:
    """``(out, columns)``: the matrix of any layer that is a linear map, with the derivatives of its parameters.

    A layer without a plain weight is asked for it: it is applied to the unit vectors.

    Args:
        layer: maps ``(..., columns)`` to ``(..., out)``.
        columns: size of its input.
        like: a tensor of the dtype and on the device that the layer computes in.

    Raises:
        ValueError: the layer adds something to the product.

    >>> layer = nn.Sequential(Linear(3, 4), Linear(4, 5))
    >>> W = effective_weight(layer, 3, like=layer[0].weight)
    >>> torch.allclose(W, layer[1].weight @ layer[0].weight, atol=1e-6)
    True
    """
    if is_plain(layer):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight
    # Zeros besides, to see what is added: as many as float8 products want their rows to be a multiple of.
    units = torch.eye(columns + 16, columns, dtype=like.dtype, device=like.device)
    found: Tensor = layer(units)
    if not torch.compiler.is_compiling() and found[columns:].any():
        raise ValueError(f"layer must be a linear map; this {type(layer).__name__} adds a bias, which has no matrix")
    return found[:columns].T
