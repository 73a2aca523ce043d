"""Sorting parameters: by module, by name, by shape, and by what a layer says of itself."""

import pytest
import torch
from torch import nn

from danlu.models.transformer import Transformer, TransformerConfig
from danlu.nn.moe import MoEConfig
from danlu.optim import check_partition, describe, param_groups


def roles(model):
    """Return {parameter name: (role, split)}."""
    groups = param_groups(model)
    return {name: (g["role"], g["split"]) for g in groups for name in g["param_names"]}


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 10, 7))
        self.A_log = nn.Parameter(torch.zeros(7, 2))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 7))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 11, 7))
        self.layer_scale = nn.Parameter(torch.zeros(7))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.mixing = nn.Parameter(torch.zeros(5, 7))


def test_parameters_of_plain_modules_are_sorted_by_what_their_owner_is():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(31, 5),
            "qkv": nn.Linear(5, 15),
            "norm": nn.LayerNorm(15),
            "rms": RMSNorm(),
            "conv": nn.Conv2d(4, 8, 3, groups=2),
            "depthwise": nn.Conv1d(4, 4, 3, groups=4, bias=False),
            "lstm": nn.LSTM(5, 7),
            "lm_head": nn.Linear(5, 29, bias=False),
            "unnamed_head": nn.Linear(5, 31, bias=False),
        }
    )
    assert roles(model) == {
        "embed.weight": ("embedding", None),
        "qkv.weight": ("matrix", None),
        "qkv.bias": ("bias", None),
        "norm.weight": ("gain", None),
        "norm.bias": ("bias", None),
        "rms.scale": ("gain", None),
        "conv.weight": ("conv", 2),
        "conv.bias": ("bias", None),
        "depthwise.weight": ("gain", None),
        "lstm.weight_ih_l0": ("matrix", 4),
        "lstm.weight_hh_l0": ("matrix", 4),
        "lstm.bias_ih_l0": ("bias", None),
        "lstm.bias_hh_l0": ("bias", None),
        "lm_head.weight": ("head", None),
        "unnamed_head.weight": ("head", None),
    }


def test_bare_parameters_are_sorted_by_name_and_shape():
    assert roles(Experts()) == {
        "gate_up_proj": ("experts", None),
        "A_log": ("gain", None),
        "cls_token": ("embedding", None),
        "position_embeddings": ("embedding", None),
        "layer_scale": ("gain", None),
        "temperature": ("gain", None),
        "mixing": ("matrix", None),
    }


def test_query_key_and_value_are_split_where_their_layer_is_known_and_gate_and_up_by_their_name():
    class Phi3Attention(nn.Module):
        num_key_value_heads, head_dim = 1, 4

        def __init__(self):
            super().__init__()
            self.qkv_proj = nn.Linear(16, 16 + 4 + 4)

    model = nn.ModuleDict({"attn": Phi3Attention(), "qkv_proj": nn.Linear(16, 24), "gate_up_proj": nn.Linear(16, 22)})
    found = roles(model)
    assert found["attn.qkv_proj.weight"] == ("matrix", (16, 4, 4))
    assert found["qkv_proj.weight"] == ("matrix", None)
    assert found["gate_up_proj.weight"] == ("matrix", 2)


def test_what_a_layer_declares_overrides_every_guess():
    model = nn.ModuleDict({"lm_head": nn.Linear(4, 6), "table": nn.Embedding(7, 4)})
    model["lm_head"].weight.danlu_role = "matrix"
    model["lm_head"].weight.danlu_split = (4, 2)
    model["table"].weight.danlu_role = "head"
    found = roles(model)
    assert found["lm_head.weight"] == ("matrix", (4, 2))
    assert found["table.weight"] == ("head", None)


def test_equal_heights_are_one_number_so_that_heads_of_any_layer_share_a_group():
    model = nn.ModuleList([nn.Linear(4, 6, bias=False), nn.Linear(4, 9, bias=False)])
    model[0].weight.danlu_split, model[1].weight.danlu_split = (2, 2, 2), 3
    assert len(param_groups(model)) == 1


def test_a_tied_head_counts_once_as_embedding():
    model = nn.ModuleDict({"lm_head": nn.Linear(4, 11, bias=False), "embed": nn.Embedding(11, 4)})
    model["lm_head"].weight = model["embed"].weight
    groups = param_groups(model)
    assert [(g["role"], len(g["params"])) for g in groups] == [("embedding", 1)]


def test_a_linear_map_that_is_as_wide_as_the_vocabulary_by_chance_stays_a_matrix():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    assert roles(model)["1.weight"] == ("matrix", None)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    assert set(roles(model)) == {"1.weight", "1.bias"}


def test_danlus_transformer_is_sorted_completely_and_its_router_is_a_matrix():
    config = TransformerConfig(
        vocab_size=31, dim=24, layers=2, hidden=16, experts=MoEConfig(num_experts=3, hidden=5, top_k=2)
    )
    model = Transformer(config)
    found = roles(model)
    assert len(found) == len(list(model.parameters()))
    assert {role for role, _ in found.values()} == {"matrix", "embedding", "head", "gain", "experts"}
    routers = {name: role for name, (role, _) in found.items() if "router" in name}
    assert set(routers.values()) == {"matrix"}


class LlamaAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))


class DeepseekV3Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 10, 8))
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 5))


class DeepseekV3Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))


def test_modules_as_the_transformers_library_builds_them_are_sorted():
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(31, 8),
            "self_attn": LlamaAttention(),
            "input_layernorm": LlamaRMSNorm(),
            "experts": DeepseekV3Experts(),
            "gate": DeepseekV3Router(),
            "lm_head": nn.Linear(8, 31, bias=False),
        }
    )
    assert {name: role for name, (role, _) in roles(model).items()} == {
        "embed_tokens.weight": "embedding",
        "self_attn.q_proj.weight": "matrix",
        "self_attn.o_proj.weight": "matrix",
        "input_layernorm.weight": "gain",
        "experts.gate_up_proj": "experts",
        "experts.down_proj": "experts",
        "gate.weight": "matrix",
        "lm_head.weight": "head",
    }


def test_groups_are_accepted_by_torchs_optimizers_and_keep_their_names():
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.1)
    assert [g["param_names"] for g in optimizer.param_groups] == [["0.weight"], ["1.weight"], ["0.bias", "1.bias"]]
    assert "*.weight" in describe(optimizer.param_groups)


def test_the_table_folds_layers_and_counts_everything():
    model = nn.Sequential(*(nn.Linear(3, 5, bias=False) for _ in range(12)))
    text = describe(param_groups(model))
    assert "*.weight" in text
    assert text.splitlines()[-1].split() == ["total", "-", "12", "180"]


class TestRefusals:
    """A parameter is neither lost nor doubled, and what cannot be is named."""

    def test_a_lost_parameter_is_named(self):
        model = nn.Linear(3, 5)
        with pytest.raises(ValueError, match="no group holds the parameter bias"):
            check_partition([{"params": [model.weight]}], model)

    def test_a_doubled_parameter_is_named(self):
        model = nn.Linear(3, 5)
        with pytest.raises(ValueError, match="parameter weight of group 1 is in the groups twice"):
            check_partition([{"params": list(model.parameters())}, {"params": [model.weight]}], model)

    def test_a_model_without_parameters(self):
        with pytest.raises(ValueError, match="model has no parameter"):
            param_groups(nn.ReLU())

    def test_something_that_is_no_module(self):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
            param_groups([])

    def test_a_lazy_module(self):
        with pytest.raises(TypeError, match="parameter weight of a lazy module has no shape yet"):
            param_groups(nn.LazyLinear(3))

    def test_a_complex_parameter(self):
        model = nn.Linear(2, 2, dtype=torch.complex64)
        with pytest.raises(TypeError, match="parameter weight is complex"):
            param_groups(model)

    @pytest.mark.parametrize(
        ("role", "split", "says"),
        [
            ("matrx", None, "danlu_role of weight must be one of .*did you mean 'matrix'"),
            ("experts", None, "weight is declared 'experts', which its shape"),
            ("matrix", 4, "split of weight must divide its 5 rows, got 4"),
            ("matrix", (2, 2), "sum to its 5 rows"),
        ],
    )
    def test_a_declaration_that_cannot_be(self, role, split, says):
        model = nn.Linear(3, 5, bias=False)
        model.weight.danlu_role, model.weight.danlu_split = role, split
        with pytest.raises(ValueError, match=says):
            param_groups(model)
