r"""Low-rank adapters: a frozen map plus a trained product of two thin matrices (Hu et al., LoRA, arXiv 2106.09685).

.. math:: y = W x + s\, B A x, \qquad A \in R^{r \times in},\ B \in R^{out \times r},\ s = \alpha / r

The factors bear PEFT's names, ``lora_A`` and ``lora_B`` (``lora_embedding_A``, ``lora_embedding_B`` on an embedding),
by which `danlu.optim.loraplus_groups` finds them.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from danlu._roles import Role, declaration, declare, oriented
from danlu._validate import integer, number, positive

__all__ = ["LoRAConfig", "LoRAEmbedding", "LoRALinear", "LoRAStack", "apply_lora", "lora_state_dict", "merge_lora"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers get an adapter, and of what size."""

    rank: int = 8
    """columns of B and rows of A"""
    alpha: float = 16.0
    """the product is multiplied by alpha / rank"""
    rank_stabilized: bool = False
    """divide alpha by sqrt(rank) instead, so that the size of the update does not fall with the rank (2312.03732)"""
    dropout: float = 0.0
    """share of the inputs of A that is dropped in training; embeddings and stacks of experts have none"""
    targets: tuple[str, ...] = ("*",)
    """patterns (of fnmatch) of the paths of the linear layers and embeddings, and of the stacks of experts, to adapt"""
    exclude: tuple[str, ...] = ("*head", "*embed*")
    """patterns of paths that are left alone all the same"""

    def __post_init__(self) -> None:
        integer("rank", self.rank)
        positive("alpha", self.alpha)
        number("dropout", self.dropout, low=0, high=1, high_open=True)
        if not self.targets:
            raise ValueError("targets must hold at least one pattern, got none")

    @property
    def scale(self) -> float:
        """The factor on the product of the two matrices."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def matches(self, path: str) -> bool:
        """Whether the layer at ``path`` is to be adapted."""
        return any(fnmatchcase(path, p) for p in self.targets) and not any(fnmatchcase(path, p) for p in self.exclude)


class LoRALinear(nn.Module):
    """A linear layer with an adapter; the layer itself is frozen.

    The factors are float32 at least, on a base of 16 bits too. A is drawn from N(0, 1 / in), so that ``A x`` is of the
    size of ``x``; B is zero, so that nothing has changed yet.

    Args:
        base: ``torch.nn.Linear``, which `danlu.nn.Linear` is.
        config: rank, scale and dropout.

    >>> layer = LoRALinear(nn.Linear(5, 3), LoRAConfig(rank=2))
    >>> x = torch.randn(7, 5)
    >>> torch.equal(layer(x), layer.base(x)), layer.lora_A.shape, layer.lora_B.shape
    (True, torch.Size([2, 5]), torch.Size([3, 2]))
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base must be a linear layer, got {type(base).__name__}")
        rows, columns = base.weight.shape
        self.base = base.requires_grad_(False)
        self.scale, self.dropout = config.scale, config.dropout
        self.lora_A = nn.Parameter(_factor(base.weight, config.rank, columns))
        declare(self, "lora_A", "matrix")
        self.lora_B = nn.Parameter(_factor(base.weight, rows, config.rank))
        declare(self, "lora_B", "matrix")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the adapter anew; the frozen layer stays."""
        nn.init.normal_(self.lora_A, std=self.lora_A.shape[1] ** -0.5)
        nn.init.zeros_(self.lora_B)

    @property
    def weight(self) -> Tensor:
        """``W + s B A``, ``(out, in)``: what the layer multiplies by when nothing is dropped."""
        return self.base.weight + self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        thin = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        y: Tensor = self.base(x) + self.scale * F.linear(thin, self.lora_B.to(x.dtype))
        return y

    def merged(self) -> nn.Module:
        """Return the layer with the adapter added to its weight, in place; `forward` must not be used afterwards."""
        with torch.no_grad():
            self.base.weight.copy_(self.weight)
        return self.base


class LoRAEmbedding(nn.Module):
    """An embedding with an adapter; the table itself is frozen.

    Here A, which is looked up, is zero and B is drawn from N(0, 1 / rank).

    Args:
        base: ``torch.nn.Embedding`` without ``max_norm``.
        config: rank and scale.

    >>> layer = LoRAEmbedding(nn.Embedding(11, 3), LoRAConfig(rank=2))
    >>> layer(torch.tensor([4, 0])).shape, layer.lora_embedding_A.shape, layer.lora_embedding_B.shape
    (torch.Size([2, 3]), torch.Size([2, 11]), torch.Size([3, 2]))
    """

    def __init__(self, base: nn.Embedding, config: LoRAConfig) -> None:
        super().__init__()
        if not isinstance(base, nn.Embedding):
            raise TypeError(f"base must be a torch.nn.Embedding, got {type(base).__name__}")
        if base.max_norm is not None:
            raise ValueError("an embedding with max_norm rewrites its own table and cannot be adapted")
        self.base = base.requires_grad_(False)
        self.scale = config.scale
        self.lora_embedding_A = nn.Parameter(_factor(base.weight, config.rank, base.num_embeddings))
        declare(self, "lora_embedding_A", "embedding")
        self.lora_embedding_B = nn.Parameter(_factor(base.weight, base.embedding_dim, config.rank))
        declare(self, "lora_embedding_B", "matrix")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the adapter anew; the frozen table stays."""
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B, std=self.lora_embedding_B.shape[1] ** -0.5)

    @property
    def weight(self) -> Tensor:
        """``W + s (B A)^T``, ``(num_embeddings, dim)``."""
        return self.base.weight + self.scale * (self.lora_embedding_B @ self.lora_embedding_A).mT

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up ``(...)`` int64 and return ``(..., dim)``."""
        thin = F.embedding(tokens, self.lora_embedding_A.mT)
        whole: Tensor = self.base(tokens)
        return whole + (self.scale * F.linear(thin, self.lora_embedding_B)).to(whole.dtype)

    def merged(self) -> nn.Module:
        """Return the embedding with the adapter added to its table, in place."""
        with torch.no_grad():
            self.base.weight.copy_(self.weight)
        return self.base


class LoRAStack(nn.Module):
    """What is added to a stack of matrices ``(..., out, in)`` that a layer of experts holds: ``s B A`` of each matrix.

    A parametrization (`torch.nn.utils.parametrize`) of the parameter: the sum is made whenever the layer reads it, so
    that a pass holds one more stack in memory. The sum has the dtype of the stack.

    Args:
        weight: the stack, of float32 or float64.
        config: rank and scale.
        transposed: whether its matrices are kept as (in, out).

    >>> LoRAStack(torch.zeros(4, 6, 5), LoRAConfig(rank=2))(torch.ones(4, 6, 5)).sum()
    tensor(120., grad_fn=<SumBackward0>)
    """

    order: tuple[str, ...] = ()
    """the parameters of the layer before it was adapted"""

    def __init__(self, weight: Tensor, config: LoRAConfig, *, transposed: bool = False) -> None:
        super().__init__()
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weight must be float32 or float64: {weight.dtype} would round small adapters away")
        self.scale, self.transposed = config.scale, transposed
        *count, rows, columns = oriented(weight.shape, transposed)
        self.lora_A = nn.Parameter(weight.new_empty(*count, config.rank, columns))
        declare(self, "lora_A", "experts")
        self.lora_B = nn.Parameter(weight.new_empty(*count, rows, config.rank))
        declare(self, "lora_B", "experts")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the adapter anew."""
        nn.init.normal_(self.lora_A, std=self.lora_A.shape[-1] ** -0.5)
        nn.init.zeros_(self.lora_B)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the stack with the adapter added, of the shape of ``weight``."""
        product = self.lora_B @ self.lora_A
        return torch.add(weight, product.mT if self.transposed else product, alpha=self.scale)


def apply_lora(model: nn.Module, config: LoRAConfig | None = None) -> nn.Module:
    """Freeze ``model`` and put an adapter on each linear layer, embedding and stack of experts that ``config`` names.

    Only the adapters are trainable afterwards. A layer that sits in several places gets one adapter. Stacks of experts
    are the parameters that `danlu.nn.declare` says so of, as `MoE`'s ``w_up`` and ``w_down``. Other parameters that are
    used without a layer of their own (the routers of `MoE`, `danlu.models.Transformer`'s embedding) stay frozen.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: no layer matches, a pattern names a parameter that has no layer of its own, a layer is smaller than
            the rank, or the model has adapters already.
        TypeError: a stack of experts is of 16 bits, which the sum with a small adapter would be rounded to.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> model = apply_lora(model, LoRAConfig(rank=2, targets=("0",)))
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.lora_A', '0.lora_B']
    """
    config = LoRAConfig() if config is None else config
    if isinstance(model, (nn.Linear, nn.Embedding)):
        raise ValueError(f"model is itself a {type(model).__name__}; wrap it in LoRALinear or LoRAEmbedding")
    layers = {}
    stacks = _stacks(model, config)
    for path, module in model.named_modules():
        if isinstance(module, (LoRALinear, LoRAEmbedding, LoRAStack)):
            raise ValueError(f"model has an adapter at {path or 'its root'} already; merge it first")
        if isinstance(module, (nn.Linear, nn.Embedding)) and config.matches(path):
            if min(module.weight.shape) < config.rank:
                shape = tuple(module.weight.shape)
                raise ValueError(f"rank must be at most the smaller size of {path}, {shape}, got {config.rank}")
            layers[module] = path
    for pattern in config.targets:
        named = [name for name, p in model.named_parameters() if p.ndim > 1 and fnmatchcase(name, pattern)]
        bare = [] if stacks.keys() & set(named) else named
        if bare and not _names_a_layer(model, pattern):
            raise ValueError(
                f"targets must name linear layers or embeddings; {pattern!r} names {bare[0]}, a parameter that the "
                "model uses without a layer of its own (a router, a Transformer's embedding)"
            )
    if not layers and not stacks:
        kinds = f"{', '.join(config.targets)} without {', '.join(config.exclude) or 'exceptions'}"
        raise ValueError(f"targets must match a linear layer, an embedding or a stack of experts, got {kinds}")
    model.requires_grad_(False)
    for name, (module, adapter) in stacks.items():
        parametrize.register_parametrization(module, name.rpartition(".")[2], adapter)
    adapted: dict[nn.Module, nn.Module] = {
        layer: LoRAEmbedding(layer, config) if isinstance(layer, nn.Embedding) else LoRALinear(layer, config)
        for layer in layers
    }
    _replace(model, adapted.get)
    return model.train(model.training)


def merge_lora(model: nn.Module) -> nn.Module:
    """Add every adapter to its layer's weight and put the layers back in their places.

    A weight that is used elsewhere as well (a head tied to its embedding) stays as it is there: the layer with the
    adapter gets one of its own, and is no longer tied.

    Returns:
        ``model``, changed in place: of the modules it had before `apply_lora`. They stay frozen.

    Raises:
        ValueError: the model has no adapter.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> merge_lora(apply_lora(model, LoRAConfig(rank=2)))
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )
    """
    adapters = [module for module in model.modules() if isinstance(module, (LoRALinear, LoRAEmbedding))]
    if not _merge_stacks(model) and not adapters:
        raise ValueError("model has no adapter to merge")
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for adapter in adapters:
        weight = adapter.base.weight
        if owners[id(weight)] > 1:
            declared = declaration(adapter.base, "weight")
            adapter.base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            if declared.role is not None:
                declare(adapter.base, "weight", cast(Role, declared.role), declared.split)
    merged: dict[nn.Module, nn.Module] = {adapter: adapter.merged() for adapter in adapters}
    _replace(model, merged.get)
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' tensors alone, to be loaded with ``model.load_state_dict(..., strict=False)``.

    >>> list(lora_state_dict(apply_lora(nn.Sequential(nn.Linear(8, 8)))))
    ['0.lora_A', '0.lora_B']
    """
    return {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2].startswith("lora_")}


def _stacks(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[nn.Module, LoRAStack]]:
    """Return {name: (what holds it, its adapter)} of the stacks of experts that are to be adapted."""
    found = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name, said = f"{path}.{key}" if path else key, declaration(module, key)
            if said.role != "experts" or not config.matches(name):
                continue
            if min(parameter.shape[-2:]) < config.rank:
                shape = tuple(parameter.shape)
                raise ValueError(f"rank must be at most the smaller size of {name}, {shape}, got {config.rank}")
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{name} is a stack of experts in {parameter.dtype}, to which the sum with a small adapter would "
                    "be rounded; accepted are float32 and float64, or a pattern in exclude that leaves it out"
                )
            adapter = LoRAStack(parameter, config, transposed=said.transposed)
            adapter.order = tuple(module._parameters)
            found[name] = module, adapter
    return found


def _merge_stacks(model: nn.Module) -> bool:
    """Add the adapters of stacks to these, and say whether there were any."""
    found = [
        (module, name, part)
        for module in list(model.modules())
        if parametrize.is_parametrized(module)
        for name, made in cast(nn.ModuleDict, module.parametrizations).items()
        for part in cast(parametrize.ParametrizationList, made)
        if isinstance(part, LoRAStack)
    ]
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    with torch.no_grad():
        for module, name, adapter in found:
            whole = getattr(module, name).clone()
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            parameter = cast(nn.Parameter, getattr(module, name))
            if owners[id(parameter)] > 1:  # it stays as it is where it is used besides
                module.register_parameter(name, nn.Parameter(whole, requires_grad=False))
            else:
                parameter.copy_(whole)
            for key in adapter.order:  # as before, for those who count parameters
                if key in module._parameters:
                    module._parameters[key] = module._parameters.pop(key)
    return bool(found)


def _names_a_layer(model: nn.Module, pattern: str) -> bool:
    return any(
        isinstance(module, (nn.Linear, nn.Embedding)) and fnmatchcase(path, pattern)
        for path, module in model.named_modules()
    )


def _factor(weight: Tensor, rows: int, columns: int) -> Tensor:
    """Memory for a factor beside this weight: its small steps need more than 16 bits."""
    return weight.new_empty(rows, columns, dtype=torch.promote_types(weight.dtype, torch.float32))


def _replace(model: nn.Module, substitute: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put ``substitute(child)``, where it is not None, in the place of every child of every module."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            found = None if child is None else substitute(child)
            if found is not None and found is not parent:
                parent._modules[name] = found
