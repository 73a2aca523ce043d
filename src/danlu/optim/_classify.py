"""What a parameter is, by the class of the layer that holds it, then by its name, then by its shape.

Where none of them is certain a fused weight is not split, a weight of three dimensions is not taken for a stack of
matrices, and the reason is kept.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from danlu._roles import Split, declared
from danlu.optim._known import (
    BELOW,
    FLATTENED,
    FUSED,
    INPUTS_FIRST,
    INTERLEAVED,
    PLAIN,
    STACKS,
    TRANSPOSED_STACKS,
    UNKNOWN,
    Rule,
)

_HEADS = {
    *("lm_head", "head", "unembed", "unembedding", "embed_out", "classifier", "score", "output_projection"),
    *("qa_outputs", "class_labels_classifier", "bbox_predictor", "seq_relationship"),
    *("cls_classifier", "distillation_classifier", "head_dist", "classification_head", "classification_heads"),
}
#: Names of heads where they stand at the top of a model: the first set of layers, the second of layers or containers.
_TOP_HEADS = {"output", "proj_out", "proj_out_2", "decoder", "logits", "fc"}
_TOP_CONTAINERS = {"heads", "lm_heads"}
#: Children that stand in a module's place: of ``torch.compile``, FSDP, activation checkpointing and PEFT.
_WRAPPED = {
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "original_module"),
    *("_forward_module", "_original_module"),
}
#: What a container called head leads to, where it has one of them beside it.
_AFTER_HEADS = {"decoder", "classifier", "score", "lm_head", "out_proj", "qa_outputs"}
#: The parts of the latent of multi-head latent attention.
_LATENT = ("kv_lora_rank", "qk_rope_head_dim")
_GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4, nn.RNNCell: 1, nn.GRUCell: 3, nn.LSTMCell: 4}
_TABLE = re.compile(
    r"embed|_token|_table$|(^|_)(emb|pos|position|positions|positional|wpe|wte|token|tokens|latents|codebooks?|queries)($|_)"
    r"|^((object|latent|learned)_)?query$|^probe$"
)
_BIAS = re.compile(r"(^|_)(bias|biases|beta|b|offset)($|_)")
_SURE_BIAS = re.compile(r"(^|_)(bias|biases)($|_)|^rpb$")
_GAIN = re.compile(r"(^|_)(log|scale|gain|gamma|alpha|temperature|dt)($|_)|^(A|D)$")
_FUSED = re.compile(
    r"qkv|query_key_value|keys_values|^c_attn$|^(to_)?kv(_proj)?$|^kv_[ab]_proj|gate_up|^in_proj$|^w12$"
)
_EXPERTS = re.compile(r"experts?|moe", re.IGNORECASE)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)
_CONV = nn.modules.conv._ConvNd
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NO_STACK = (
    "three or more dimensions, but of no known stack of matrices: not orthogonalised (declare it 'experts' if so)"
)


class Kind(NamedTuple):
    """What a parameter is; ``note`` says what is not certain about it."""

    role: str
    split: Split = None
    transposed: bool = False
    note: str | None = None


class Place(NamedTuple):
    """Where a parameter stands: the layer that holds it, without what wraps either."""

    path: tuple[str, ...]  # of the layer
    name: str
    layer: nn.Module
    owner: nn.Module | None  # what holds the layer
    parameter: nn.Parameter

    @property
    def leaf(self) -> str:
        """What the layer is called, if the parameter is its weight; else the parameter's name."""
        return self.path[-1] if self.path and self.name == "weight" else self.name


class Model:
    """What has to be known of a whole model to say what each of its parameters is."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        #: Number of modules in one another that hold the model itself and nothing else.
        self.depth, core = 0, model
        while (child := _only_child(core)) is not None and not isinstance(core, _CONTAINERS):
            if next(child.children(), None) is None:
                break
            self.depth, core = self.depth + 1, child
        maps = [module for module in model.modules() if _is_map(module)]
        self.heads = set(self._heads())
        rows = [module.out_features for module in maps if isinstance(module, nn.Linear)]
        widths = {module.in_features for module in maps if isinstance(module, nn.Linear)}
        tables = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
        last = maps[-1] if maps and isinstance(maps[-1], nn.Linear) else None
        # The last map of all, as high as a table, and alone in that: a head that is called otherwise.
        heights = {table.num_embeddings for table in tables} - widths
        if last is not None and rows.count(last.out_features) == 1 and last.out_features in heights:
            self.heads.add(id(last))

    def place(self, path: str, name: str, layer: nn.Module, parameter: nn.Parameter) -> Place:
        """Return where the parameter ``name`` of the module at ``path`` stands."""
        parts = path.split(".") if path else []
        if isinstance(layer, ParametrizationList):  # conv.parametrizations.weight holds what conv.weight is made of
            *parts, _, name = parts
        elif isinstance(layer, (nn.ParameterDict, nn.ParameterList)) and parts:
            *parts, name = parts
        layer = self.modules[".".join(parts)]
        clean: list[str] = []
        owners: list[nn.Module] = [self.modules[""]]
        for index, part in enumerate(parts):
            module = self.modules[".".join(parts[: index + 1])]
            wrapped = part in _WRAPPED or (part == "module" and _only_child(owners[-1]) is not None)
            saved = "modules_to_save" in parts[max(0, index - 1) : index + 1]  # and the name of an adapter
            if index < self.depth or wrapped or saved:
                owners[-1] = module
            else:
                clean.append(part)
                owners.append(module)
        return Place(tuple(clean), name, layer, owners[-2] if len(owners) > 1 else None, parameter)

    def _heads(self) -> Iterator[int]:
        for path, module in self.modules.items():
            place = self.place(path, "weight", module, nn.Parameter())
            leaf, top = place.path[-1] if place.path else "", len(place.path) == 1
            holder = type(place.owner).__name__
            if "Router" in holder or "Pool" in type(module).__name__:
                continue
            if leaf == "head" and not _is_map(module) and self._has_decoder(place):
                continue
            if leaf in _HEADS or (top and leaf in _TOP_CONTAINERS):
                parts = list(module.children()) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else [module]
                for part in parts:
                    yield from [id(m) for name, m in part.named_modules() if _is_map(m) and "lora_" not in name][-1:]
            elif isinstance(module, nn.Linear) and (
                (top and leaf in _TOP_HEADS) or (leaf == "decoder" and re.search("Head|Predict", holder))
            ):
                yield id(module)

    @staticmethod
    def _has_decoder(place: Place) -> bool:
        """Say whether beside a container called head there is what the head leads to."""
        return any(name in _AFTER_HEADS for name, _ in place.owner.named_children()) if place.owner else False


def _only_child(module: nn.Module) -> nn.Module | None:
    """Return the child that has parameters, if it has all of them."""
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    return children[0] if len(children) == 1 and not module._parameters else None


def _names(layer: Any) -> tuple[str, ...]:
    """Return the name of a layer's class and of those it is made of: ``fully_shard`` makes an FSDPMLP of an MLP."""
    return tuple(kind.__name__ for kind in type(layer).__mro__[:-2])


def _is_map(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _CONV)) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Say whether a module is GPT-2's linear layer, whose weight is kept as (inputs, outputs)."""
    return "Conv1D" in _names(module) and hasattr(module, "nf")


def classify(full: str, holder: nn.Module, key: str, place: Place, model: Model) -> Kind:
    """Return what the parameter ``full``, which ``holder`` has under the name ``key``, is."""
    said = declared(full, getattr(holder, key), holder)
    if said.role is not None:
        return Kind(said.role, said.split, said.transposed)
    found = _guess(place, model, isinstance(holder, ParametrizationList) and key)
    if said.split is not None:
        found = found._replace(split=said.split, note=None)
    return found._replace(transposed=said.transposed or found.transposed)


def _guess(place: Place, model: Model, made_of: Any) -> Kind:
    _, name, layer, _, parameter = place
    lower, kinds = name.lower(), _names(layer)
    extent = sum(size != 1 for size in parameter.shape)
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return Kind("embedding")
    if isinstance(layer, _NORMS) or any(kind.endswith("Norm") for kind in kinds):
        return Kind("bias" if _BIAS.search(lower) else "gain")
    if _weight_norm(layer, name, made_of):
        magnitude = made_of == "original0" or name.endswith("_g")
        name = "weight"
        if magnitude:
            return Kind("gain")
    if name == "weight" and isinstance(layer, (_CONV, nn.Linear)):
        if id(layer) in model.heads:
            return Kind("head")
        return _kernel(layer, parameter) if isinstance(layer, _CONV) else _fused(place, *parameter.shape)
    if name == "weight" and _is_conv1d(layer):
        return _conv1d(place, parameter, model)
    if not name.endswith("_table") and _SURE_BIAS.search(lower):
        return Kind("bias")
    if extent <= 1:
        if _TABLE.search(lower):
            return Kind("embedding")
        return Kind("bias" if _BIAS.search(lower) else "gain")
    if _TABLE.search(lower) or (
        name == "weight" and parameter.ndim == 2 and kinds[0].endswith(("Embedding", "Embeddings"))
    ):
        return Kind("embedding")
    if _GAIN.search(name):
        return Kind("gain")
    if parameter.ndim == 2:
        gates = next((count for cell, count in _GATES.items() if isinstance(layer, cell)), 1)
        if gates > 1 and parameter.shape[0] % gates == 0:
            return Kind("matrix", gates)
        return _fused(place, *parameter.shape)
    return _stack(place, parameter)


def _weight_norm(layer: nn.Module, name: str, made_of: Any) -> bool:
    """Say whether a parameter is the magnitude or the direction of a weight, or what another weight is made of."""
    if made_of:
        return True
    return name in ("weight_g", "weight_v") and hasattr(layer, "weight_g") and hasattr(layer, "weight_v")


def _kernel(layer: Any, parameter: Tensor) -> Kind:
    if layer.groups > 1 and parameter.shape[1] == 1:
        return Kind("gain")  # one kernel a channel acts on coordinates one by one: no linear map between channels
    turned = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return Kind("conv", layer.groups if layer.groups > 1 else None, turned)


def _conv1d(place: Place, parameter: Tensor, model: Model) -> Kind:
    columns, rows = parameter.shape
    if id(place.layer) in model.heads:
        return Kind("head", None, True)
    if place.leaf == "c_attn" and rows in (2 * columns, 3 * columns):
        return Kind("matrix", rows // columns, True)
    return _fused(place, rows, columns)._replace(transposed=True)


def _fused(place: Place, rows: int, columns: int) -> Kind:
    """Return the kind of a matrix, with its split where its layer or its name is known."""
    leaf = place.leaf
    holder = place.owner if leaf != place.name else place.layer
    kinds = _names(holder)
    split = _known(holder, leaf, rows, columns)
    if any(leaf in BELOW.get(kind, ()) for kind in kinds) and isinstance(split, int):
        return Kind("conv", split, True)
    if split is not None:
        pass
    elif isinstance(place.layer, nn.MultiheadAttention) and place.name == "in_proj_weight":
        split = 3
    elif leaf in ("gate_up_proj", "gate_up") and rows % 2 == 0:
        split = 2
    elif leaf in ("qkv", "Wqkv", "to_qkv") and any(k.endswith("Attention") for k in kinds) and rows == 3 * columns:
        split = 3
    elif leaf == "kv_a_proj_with_mqa" and rows == sum(getattr(holder, n, 0) for n in _LATENT):
        split = tuple(getattr(holder, n) for n in _LATENT)
    elif leaf == "kv_b_proj":
        split = INTERLEAVED
    elif _FUSED.search(leaf) and not any((kind, leaf) in PLAIN for kind in kinds):
        split = UNKNOWN
    return _kind("matrix", split)


def _known(holder: Any, leaf: str, rows: int, columns: int) -> Split | str:
    """Return the split of a fused weight of a known class or why there is none; None for a class that is not known."""
    rule = next((FUSED[kind][leaf] for kind in _names(holder) if leaf in FUSED.get(kind, ())), None)
    return None if rule is None else _checked(rule, holder, rows, columns)


def _checked(rule: Rule, holder: Any, rows: int, columns: int) -> Split | str:
    """Return what a rule says, unless the layer is another one of the same name."""
    try:
        split = rule(holder, rows, columns)
    except AttributeError:
        return UNKNOWN
    fits = sum(split) == rows if isinstance(split, tuple) else isinstance(split, str) or rows % (split or 1) == 0
    return split if fits else UNKNOWN


def _kind(role: str, said: Split | str, *, transposed: bool = False) -> Kind:
    """Return a kind with the split that was said, or with the reason why there is none."""
    return Kind(role, None, transposed, said) if isinstance(said, str) else Kind(role, said, transposed)


def _stack(place: Place, parameter: Tensor) -> Kind:
    """Return the kind of a weight of three or more dimensions that nothing else is known of."""
    kinds, name = _names(place.layer), place.name
    flattened = next((FLATTENED[kind][name] for kind in kinds if name in FLATTENED.get(kind, ())), None)
    if flattened is not None:
        return Kind("conv", None, flattened == INPUTS_FIRST)
    if any(name in STACKS.get(kind, ()) for kind in kinds):
        return Kind("experts")
    named = ("gate_up_proj", "down_proj", "gate_proj", "up_proj", "w_up", "w_down")
    if parameter.ndim != 3 or not (name in named or any(map(_EXPERTS.search, (*kinds, *place.path)))):
        return Kind("embedding") if parameter.shape[0] == 1 else Kind("head", note=_NO_STACK)
    turned = _transposed(place.layer)
    rows, columns = parameter.shape[-2:][::-1] if turned else parameter.shape[-2:]
    if name != "gate_up_proj":
        return _kind("experts", _known(place.owner, place.leaf, rows, columns), transposed=bool(turned))
    split: Split | str = 2
    rule = next((TRANSPOSED_STACKS[kind] for kind in kinds if kind in TRANSPOSED_STACKS), None)
    concatenated = getattr(place.layer, "is_concatenated", None)  # as transformers writes on every layer of experts
    if rule is not None:
        split = _checked(rule, place.layer, rows, columns)
    elif concatenated is False:
        split = INTERLEAVED
    elif turned is None or (turned and concatenated is None) or rows % 2:
        split = UNKNOWN
    return _kind("experts", split, transposed=bool(turned))


def _transposed(layer: Any) -> bool | None:
    """Say whether a stack of experts is kept as (experts, inputs, outputs); None where nothing tells."""
    if any(kind in TRANSPOSED_STACKS for kind in _names(layer)):
        return True
    said = getattr(layer, "is_transposed", None)
    if isinstance(said, bool):
        return said
    up, down = getattr(layer, "gate_up_proj", None), getattr(layer, "down_proj", None)
    if isinstance(up, Tensor) and isinstance(down, Tensor) and up.ndim == down.ndim == 3:
        if up.shape[2] == down.shape[1] and up.shape[1] == 2 * down.shape[2]:
            return False
        if up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1]:
            return True
    return None
