"""Models as torchvision, timm and diffusers write them, and a step of Muon on a weight that a table knows."""

import torch
from torch import nn

from danlu.optim import MuonConfig, param_groups


def roles(model):
    """Return {name: role and split}, without biases and gains of norms."""
    return {
        name: g["role"] + (f"/{g['split']}" if g["split"] else "")
        for g in param_groups(model)
        for name in g["param_names"]
        if g["role"] != "bias" and "norm" not in name and "bn" not in name
    }


class ResNet(nn.Module):
    """torchvision's."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.ModuleDict({"conv1": nn.Conv2d(8, 8, 3), "downsample": nn.Sequential(nn.Conv2d(8, 8, 1))})
        self.fc = nn.Linear(8, 10)


class ShiftedWindowAttention(nn.Module):
    """torchvision's."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))


class MobileNet(nn.Module):
    """torchvision's."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(8, 10))


def test_torchvisions_models():
    assert roles(ResNet()) == {
        "conv1.weight": "conv",
        "layer1.conv1.weight": "conv",
        "layer1.downsample.0.weight": "conv",
        "fc.weight": "head",
    }
    assert roles(MobileNet()) == {
        "features.0.weight": "conv",
        "features.1.weight": "gain",
        "classifier.1.weight": "head",
    }
    assert roles(ShiftedWindowAttention()) == {
        "qkv.weight": "matrix/3",
        "proj.weight": "matrix",
        "relative_position_bias_table": "embedding",
    }


class Attention(nn.Module):
    """timm's."""

    def __init__(self):
        super().__init__()
        self.qkv, self.q_norm, self.proj = nn.Linear(8, 24), nn.LayerNorm(4), nn.Linear(8, 8)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))


class GluMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(16, 8)


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.reg_token = nn.Parameter(torch.zeros(1, 4, 8))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 8, 4)})
        block = {"norm1": nn.LayerNorm(8), "attn": Attention(), "ls1": LayerScale(), "mlp": GluMlp()}
        self.blocks = nn.Sequential(nn.ModuleDict(block))
        self.norm, self.head, self.head_dist = nn.LayerNorm(8), nn.Linear(8, 10), nn.Linear(8, 10)


def test_timms_models():
    assert roles(VisionTransformer()) == {
        "cls_token": "embedding",
        "reg_token": "embedding",
        "pos_embed": "embedding",
        "patch_embed.proj.weight": "conv",
        "blocks.0.attn.qkv.weight": "matrix/3",
        "blocks.0.attn.proj.weight": "matrix",
        "blocks.0.ls1.gamma": "gain",
        "blocks.0.mlp.fc1.weight": "matrix/2",
        "blocks.0.mlp.fc2.weight": "matrix",
        "head.weight": "head",
        "head_dist.weight": "head",
    }


class GEGLU(nn.Module):
    """diffusers'."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 64)


class PixArt(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, 8))
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(4, 8, 2)})
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(4, 8), "linear_2": nn.Linear(8, 8)})
        names = ("to_q", "to_k", "to_v")
        attention = nn.ModuleDict({**{n: nn.Linear(8, 8) for n in names}, "to_out": nn.ModuleList([nn.Linear(8, 8)])})
        feed_forward = nn.ModuleDict({"net": nn.ModuleList([GEGLU(), nn.Dropout(), nn.Linear(32, 8)])})
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn1": attention, "ff": feed_forward})])
        self.proj_out = nn.Linear(8, 16)


def test_diffusers_models():
    block = "transformer_blocks.0"
    assert roles(PixArt()) == {
        "scale_shift_table": "embedding",
        "pos_embed.proj.weight": "conv",
        "time_embedding.linear_1.weight": "matrix",
        "time_embedding.linear_2.weight": "matrix",
        **{f"{block}.attn1.{name}.weight": "matrix" for name in ("to_q", "to_k", "to_v", "to_out.0")},
        f"{block}.ff.net.0.proj.weight": "matrix/2",
        f"{block}.ff.net.2.weight": "matrix",
        "proj_out.weight": "head",
    }


class DbrxExpertGLU(nn.Module):
    """transformers' experts, one below the other; the last map is kept with its inputs first."""

    def __init__(self):
        super().__init__()
        self.moe_num_experts = 3
        self.w1, self.v1, self.w2 = (nn.Parameter(torch.zeros(3 * 6, 4)) for _ in range(3))


def test_the_experts_of_dbrx_step_as_three_layers_of_torch_do():
    fused = DbrxExpertGLU()
    apart = nn.ModuleList(
        nn.ModuleDict({"w1": nn.Linear(4, 6, bias=False), "w2": nn.Linear(6, 4, bias=False)}) for _ in range(3)
    )
    generator = torch.Generator().manual_seed(0)
    for name in ("w1", "w2"):
        weight = getattr(fused, name)
        weight.grad = torch.randn(weight.shape, generator=generator)
        for layer, part in zip(apart, weight.grad.chunk(3)):
            nn.init.zeros_(layer[name].weight)
            layer[name].weight.grad = (part if name == "w1" else part.mT).contiguous()
    for model in (fused, apart):
        MuonConfig(lr=0.1, scale="mup", dtype="float32").build(model).step()
    assert fused.w2.abs().sum() > 0
    for name in ("w1", "w2"):
        parts = [layer[name].weight if name == "w1" else layer[name].weight.mT for layer in apart]
        torch.testing.assert_close(getattr(fused, name), torch.cat(parts), rtol=0, atol=1e-5)


class Conv1D(nn.Module):
    """transformers' linear layer of GPT-2: inputs before outputs."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.zeros(nx, nf))


class GPT2Attention(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.c_attn = layer


def test_gpt2s_query_key_and_value_step_as_three_layers_of_torch_do():
    fused = GPT2Attention(Conv1D(24, 8))
    apart = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
    gradient = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    fused.c_attn.weight.grad = gradient
    for layer, part in zip(apart, gradient.split(8, dim=1), strict=True):
        nn.init.zeros_(layer.weight)
        layer.weight.grad = part.mT.contiguous()
    for model in (fused, apart):
        MuonConfig(lr=0.1, scale="mup", dtype="float32").build(model).step()
    together = torch.cat([layer.weight.detach() for layer in apart])
    assert together.abs().sum() > 0
    torch.testing.assert_close(fused.c_attn.weight.detach().mT, together, rtol=0, atol=1e-5)
