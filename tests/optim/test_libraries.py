"""Roles in the networks of diffusers, and in models that PEFT, torch.compile, DDP and FSDP2 have wrapped."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from danlu.optim import check_partition, param_groups

SIZES = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "num_layers": 1, "sample_size": 8}
FLUX = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
ATTENTION = {"to_q", "to_k", "to_v", "to_out"}
BOTH = ATTENTION | {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
TIMES = {"linear_1", "linear_2"}
KERNELS = {"conv_in", "conv1", "conv2"}
#: {class: (its arguments, {role: last parts of the names})}
DIFFUSERS = {
    "DiTTransformer2DModel": (
        {**SIZES, "norm_num_groups": 2},
        {
            "matrix": ATTENTION | TIMES | {"net.0.proj", "net.2"},
            "matrix/6": {"linear"},
            "matrix/2": {"proj_out_1"},
            "conv": {"proj"},
            "embedding": {"embedding_table"},
            "head": {"proj_out_2"},
        },
    ),
    "PixArtTransformer2DModel": (
        {**SIZES, "norm_num_groups": 2, "cross_attention_dim": 8, "caption_channels": 12},
        {
            "matrix": ATTENTION | TIMES | {"net.0.proj", "net.2"},
            "matrix/6": {"linear"},
            "conv": {"proj"},
            "embedding": {"scale_shift_table"},
            "head": {"proj_out"},
        },
    ),
    "FluxTransformer2DModel": (
        {**FLUX, "joint_attention_dim": 12, "pooled_projection_dim": 6, "axes_dims_rope": (4, 4, 8)},
        {
            "matrix": BOTH | TIMES | {"net.0.proj", "net.2", "context_embedder", "x_embedder", "proj_mlp", "proj_out"},
            "matrix/6": {"linear"},
            "matrix/3": {"linear"},
            "matrix/2": {"linear"},
            "head": {"proj_out"},
        },
    ),
    "SD3Transformer2DModel": (
        {
            **{**SIZES, "num_layers": 2, "out_channels": 4, "pos_embed_max_size": 8},
            **{"joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 6},
        },
        {
            "matrix": BOTH | TIMES | {"net.0.proj", "net.2", "context_embedder"},
            "matrix/6": {"linear"},
            "matrix/2": {"linear"},
            "conv": {"proj"},
            "head": {"proj_out"},
        },
    ),
    "UNet2DConditionModel": (
        {
            **{"sample_size": 8, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2},
            **{"down_block_types": DOWN, "up_block_types": UP, "cross_attention_dim": 8, "attention_head_dim": 2},
        },
        {
            "matrix": ATTENTION | TIMES | {"net.2", "time_emb_proj"},
            "matrix/2": {"net.0.proj"},
            "conv": KERNELS | {"conv_shortcut", "conv", "proj_in", "proj_out", "conv_out"},
        },
    ),
    "AutoencoderKL": (
        {"block_out_channels": (4,), "norm_num_groups": 2},
        {"matrix": ATTENTION, "conv": KERNELS | {"conv_out", "quant_conv", "post_quant_conv"}},
    ),
}


def leaf(name):
    parts = name.removesuffix(".weight").split(".")
    if parts[-1] == "0" and parts[-2] == "to_out":
        return "to_out"
    return ".".join(parts[parts.index("net") :]) if "net" in parts else parts[-1]


def roles(model):
    """Return {name: role and split}."""
    groups = param_groups(model)
    check_partition(groups, model)
    return {
        name: group["role"] + (f"/{group['split']}" if group["split"] else "")
        for group in groups
        for name in group["param_names"]
    }


@pytest.mark.parametrize("name", DIFFUSERS)
def test_every_map_of_a_network_of_diffusers_has_its_role(name):
    diffusers = pytest.importorskip("diffusers")
    options, expected = DIFFUSERS[name]
    with torch.device("meta"):
        model = getattr(diffusers, name)(**options)
    found = {}
    for full, role in roles(model).items():
        if role not in ("bias", "gain"):
            found.setdefault(role, set()).add(leaf(full))
    assert found == expected


def tiny():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 4}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "decoder_sparse_step": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts, **heads))


def test_a_model_of_peft_trains_factors_as_matrices_and_a_saved_head_as_a_head():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    found = roles(peft.get_peft_model(tiny(), config))
    short = {name.removeprefix("base_model.model.").removeprefix("model."): role for name, role in found.items()}
    assert short == {
        "layers.0.self_attn.q_proj.lora_A.default.weight": "matrix",
        "layers.0.self_attn.q_proj.lora_B.default.weight": "matrix",
        "embed_tokens.lora_embedding_A.default": "embedding",
        "embed_tokens.lora_embedding_B.default": "embedding",
        "lm_head.modules_to_save.default.weight": "head",
    }


@pytest.fixture
def alone():
    """A world of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DDP": DistributedDataParallel,
    "torch.compile of DDP": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "fully_shard": fully_shard,
    "fully_shard of layers": lambda model: [fully_shard(part) for part in (*model.model.layers, model)][-1],
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.usefixtures("alone")
def test_a_wrapped_model_has_the_roles_of_the_bare_one(wrap):
    bare = roles(tiny())
    assert {"matrix", "experts", "experts/2", "embedding", "head", "gain"} == set(bare.values())
    wrapped = roles(WRAPPERS[wrap](tiny()))
    plain = {name.replace("_orig_mod.", "").removeprefix("module."): role for name, role in wrapped.items()}
    assert plain == bare
