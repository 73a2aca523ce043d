"""What a parameter is where a name or a shape could mislead: heads, tables, biases, wrappers, fused weights."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from danlu.optim import MuonConfig, describe, param_groups


def roles(model):
    """Return {parameter name: (role, split)}."""
    return {name: (g["role"], g["split"]) for g in param_groups(model) for name in g["param_names"]}


def role(model, name):
    return roles(model)[name][0]


def notes(model):
    return {name: g["note"] for g in param_groups(model) if g["note"] for name in g["param_names"]}


class Top(nn.Module):
    """A model of two layers, the second called as a head may be."""

    def __init__(self, name, layer=None):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({name: nn.Linear(4, 4)} if name in ("output", "decoder", "fc") else {})
        self.add_module(name, nn.Linear(4, 6) if layer is None else layer)


class Holder(nn.Module):
    """What holds one bare parameter."""

    def __init__(self, name, *shape):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class LightningLike(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()


WRAPPERS = {
    "bare": lambda model: model,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "torch.compile of DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "Lightning": LightningLike,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("name", ["output", "decoder", "proj_out", "logits", "fc", "classifier", "head", "lm_head"])
def test_a_head_is_one_bare_and_wrapped_and_its_namesake_inside_is_none(name, wrap):
    found = [(full, kind) for full, (kind, _) in roles(WRAPPERS[wrap](Top(name))).items() if full.endswith("weight")]
    heads = [full for full, kind in found if kind == "head"]
    assert [full.split(".")[-2] for full in heads] == [name]
    assert not any("inner" in full for full in heads)
    assert all(kind in ("head", "matrix") for _, kind in found)


@pytest.mark.parametrize(
    ("name", "layer", "heads"),
    [
        ("classifier", nn.Sequential(nn.Flatten(), nn.Linear(4, 6)), {"classifier.1"}),
        (
            "classifier",
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 6)),
            {"classifier.2"},
        ),  # torchvision's VGG
        ("classifier", nn.Conv2d(4, 6, 1), {"classifier"}),
        ("lm_heads", nn.ModuleList(nn.Linear(4, 6) for _ in range(2)), {"lm_heads.0", "lm_heads.1"}),
        ("heads", nn.Sequential(nn.Linear(4, 6)), {"heads.0"}),  # torchvision's ViT
        ("head", nn.ModuleDict({"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 6)}), {"head.fc"}),  # timm
    ],
)
def test_the_last_map_of_a_container_called_head_is_the_head(name, layer, heads):
    found = roles(Top(name, layer))
    assert {full.removesuffix(".weight") for full, (kind, _) in found.items() if kind == "head"} == heads


def test_a_map_as_high_as_a_table_is_a_head_only_as_the_last_of_all_and_alone():
    model = nn.Sequential(nn.Embedding(256, 8), nn.ModuleDict({n: nn.Linear(8, 256) for n in ("k", "v")}))
    assert {kind for name, (kind, _) in roles(model).items() if name.endswith("weight")} == {"embedding", "matrix"}
    alone = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256), nn.Linear(8, 8))
    assert role(alone, "1.weight") == "matrix"
    assert role(alone[:2], "1.weight") == "head"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("gate_up_proj_bias", (3, 8), "bias"),
        ("r_w_bias", (4, 8), "bias"),
        ("attention_biases", (4, 9), "bias"),
        ("relative_position_bias_table", (9, 4), "embedding"),
        ("scale_shift_table", (6, 8), "embedding"),
        ("query", (1, 5, 8), "embedding"),
        ("queries", (5, 8), "embedding"),
        ("latents", (5, 8), "embedding"),
        ("codebook", (16, 8), "embedding"),
        ("rel_pos_h", (9, 8), "embedding"),
        ("something", (1, 5, 8), "embedding"),
        ("weight", (5, 8), "matrix"),
    ],
)
def test_bare_parameters_are_told_apart_by_their_names(name, shape, expected):
    assert role(Holder(name, *shape), name) == expected


def test_the_parameters_of_peft_are_found_under_its_adapters_names():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})
            self.lora_embedding_A = nn.ParameterDict({"default": torch.zeros(2, 7)})
            self.lora_embedding_B = nn.ParameterDict({"default": torch.zeros(4, 2)})

    class Saved(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.original_module = base.requires_grad_(False)
            self.modules_to_save = nn.ModuleDict({"default": nn.Linear(4, 6, bias=False)})

    model = nn.ModuleDict({"q_proj": Adapted(nn.Linear(4, 6)), "lm_head": Saved(nn.Linear(4, 6))})
    peft = nn.ModuleDict({"base_model": nn.ModuleDict({"model": model})})
    assert {name.split(".", 2)[2]: kind for name, (kind, _) in roles(peft).items()} == {
        "q_proj.lora_A.default.weight": "matrix",
        "q_proj.lora_B.default.weight": "matrix",
        "q_proj.lora_embedding_A.default": "embedding",
        "q_proj.lora_embedding_B.default": "embedding",
        "lm_head.modules_to_save.default.weight": "head",
    }
    model.requires_grad_(True)
    assert role(peft, "base_model.model.lm_head.original_module.weight") == "head"
    assert role(nn.ModuleDict({"head": Adapted(nn.Linear(4, 6))}), "head.lora_B.default.weight") == "matrix"


@pytest.mark.parametrize("norm", [weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_normed_convolution_is_a_convolution_and_its_magnitude_a_gain(norm):
    found = sorted(roles(norm(nn.Conv1d(4, 6, 3, groups=2, bias=False))).values(), key=str)
    assert found == [("conv", 2), ("gain", None)]
    found = sorted(roles(norm(nn.Linear(4, 6, bias=False))).values(), key=str)
    assert found == [("gain", None), ("matrix", None)]


def test_a_spectrally_normed_layer_keeps_its_role():
    model = nn.ModuleDict({"head": nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6, bias=False))})
    assert role(model, "head.parametrizations.weight.original") == "head"


def test_kernels_of_one_channel_are_gains_only_where_each_channel_has_its_own():
    assert role(nn.Conv2d(1, 32, 3), "weight") == "conv"
    assert role(nn.Conv2d(8, 8, 3, groups=8), "weight") == "gain"


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(48, 128)


class GemmaAttention(nn.Module):
    """Sixteen query heads and eight of keys and values, wider together than the model."""

    def __init__(self):
        super().__init__()
        self.qkv_proj = nn.Linear(24, (16 + 2 * 8) * 4)


class Attention(nn.Module):
    """As timm and torchvision have it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)


class GPTNeoXAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_key_value = nn.Linear(8, 24)


@pytest.mark.parametrize(
    ("layer", "name", "says"),
    [
        (MLP, "in_proj.weight", "may hold several maps, in an order that is not known; not split"),
        (GemmaAttention, "qkv_proj.weight", "may hold several maps"),
        (GPTNeoXAttention, "query_key_value.weight", "its parts take turns"),
    ],
)
def test_a_fused_weight_whose_order_is_not_known_is_not_split_and_the_table_says_so(layer, name, says):
    model = nn.ModuleDict({"layer": layer()})
    assert roles(model)[f"layer.{name}"] == ("matrix", None)
    assert notes(model) == {f"layer.{name}": notes(model)[f"layer.{name}"]}
    text = describe(param_groups(model))
    assert f"layer.{name}: {says}" in text
    optimizer = MuonConfig().build(model)
    assert says in describe(optimizer.param_groups)


def test_a_split_that_somebody_declares_needs_no_note():
    model = GPTNeoXAttention()
    model.query_key_value.weight.danlu_split = 6
    assert roles(model)["query_key_value.weight"] == ("matrix", 6)
    assert notes(model) == {}


def test_a_fused_weight_of_a_known_layer_is_split_whatever_wraps_the_layer():
    for wrap in WRAPPERS.values():
        found = roles(wrap(nn.Sequential(Attention())))
        assert [split for name, (_, split) in found.items() if name.endswith("qkv.weight")] == [3]
    compiled = Attention()
    compiled.qkv = torch.compile(compiled.qkv, backend="eager")
    assert roles(compiled)["qkv._orig_mod.weight"] == ("matrix", 3)


def test_a_class_made_of_a_known_one_is_known():
    """As ``fully_shard`` makes them."""
    model = Attention()
    model.__class__ = type("FSDPAttention", (Attention,), {})
    assert roles(model)["qkv.weight"] == ("matrix", 3)


class Experts(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(up)), nn.Parameter(torch.zeros(down))


def test_a_stack_of_experts_is_oriented_by_the_shapes_of_both_its_maps():
    (down,), (up,) = ([g for g in param_groups(Experts((3, 10, 8), (3, 8, 5))) if g["split"] == s] for s in (None, 2))
    assert (up["role"], up["transposed"], down["transposed"]) == ("experts", False, False)
    turned = param_groups(Experts((3, 8, 10), (3, 5, 8)))
    assert all(g["transposed"] and g["split"] is None for g in turned)
    assert [g["param_names"] for g in turned if g["note"]] == [["gate_up_proj"]]


def test_three_dimensions_alone_make_no_stack_of_matrices():
    model = Holder("mystery", 3, 4, 5)
    assert role(model, "mystery") not in ("matrix", "experts", "conv")
    assert "of no known stack of matrices" in notes(model)["mystery"]
    assert "mystery: three or more dimensions" in describe(param_groups(model))


class FalconAttention(nn.Module):
    """Somebody else's layer with a known name."""

    def __init__(self):
        super().__init__()
        self.query_key_value = nn.Linear(8, 24)


class SwiGLU(nn.Module):
    """As diffusers has it, or with a map of its own for the output."""

    def __init__(self, *, output):
        super().__init__()
        self.proj = nn.Linear(8, 32)
        if output:
            self.out = nn.Linear(16, 8)


def test_another_layer_of_a_known_name_is_not_split():
    assert roles(nn.ModuleList([FalconAttention()]))["0.query_key_value.weight"] == ("matrix", None)
    assert roles(nn.ModuleList([SwiGLU(output=False)]))["0.proj.weight"] == ("matrix", 2)
    assert roles(nn.ModuleList([SwiGLU(output=True)]))["0.proj.weight"] == ("matrix", None)


def test_one_expert_is_a_stack_too():
    assert roles(Experts((1, 10, 8), (1, 8, 5))) == {"gate_up_proj": ("experts", 2), "down_proj": ("experts", None)}


def test_a_fused_weight_of_the_one_layer_of_a_model_is_split_too():
    class CausalSelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = nn.Linear(8, 24)

    assert roles(CausalSelfAttention())["c_attn.weight"] == ("matrix", 3)
