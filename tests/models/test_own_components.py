"""Mixers, activations and state spaces of somebody else's file, used by the Transformer as its own are."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu import config as configs
from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig, Linear, SSMConfig
from danlu.nn.ssm import S4DConfig
from danlu.protocols import Context


class RunningMean(nn.Module):
    """The mean of the tokens so far of each document, through one linear map."""

    rope_dim, mask, num_heads = 0, None, 1

    def __init__(self, dim: int, out_std: float) -> None:
        super().__init__()
        self.out = Linear(dim, dim, std=out_std)

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> "Sums":
        return Sums()

    def flops_per_token(self, length: int) -> float:
        return 0.0

    def forward(self, x: Tensor, context: "Context[Sums]") -> Tensor:
        if context.cache is not None:
            context.cache.total = context.cache.total + x.sum(1, keepdim=True)
            context.cache.length += x.shape[1]
            assert x.shape[1] == 1
            return self.out(context.cache.total / context.cache.length)
        documents = torch.zeros_like(x[..., 0]) if context.documents is None else context.documents
        same = (documents[:, :, None] == documents[:, None, :]).tril().to(x.dtype)
        return self.out(same / same.sum(-1, keepdim=True) @ x)


class Sums:
    length: int = 0
    total: Tensor | float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunningMeanConfig:
    gain: float = 1.0

    def build(self, dim: int, *, out_std: float, index: int, **others: Any) -> RunningMean:
        return RunningMean(dim, self.gain * out_std * (index + 1))


@dataclass(frozen=True, kw_only=True)
class ReLUConfig:
    def build(self, **others: Any) -> nn.Module:
        return nn.ReLU()


@dataclass(frozen=True, kw_only=True)
class DelayConfig:
    """State spaces that give back the input before the last one."""

    def build(self, channels: int, **others: Any) -> "Delay":
        return Delay(channels)


class Delay(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def kernel(self, length: int) -> Tensor:
        return F.one_hot(torch.tensor(1), length).double().expand(self.channels, -1)


def build(**changes: Any) -> Transformer:
    torch.manual_seed(3)
    sizes = {"vocab_size": 17, "dim": 12, "layers": 2, "hidden": 10, "attention": RunningMeanConfig()}
    return TransformerConfig(**sizes | changes).build().double()


def test_a_mixer_of_ones_own_trains_packs_documents_and_decodes() -> None:
    model, tokens = build(), torch.arange(7)[None]
    documents = torch.tensor([[0] * 3 + [1] * 4])
    packed = model(tokens, documents=documents)
    torch.testing.assert_close(packed, torch.cat((model(tokens[:, :3]), model(tokens[:, 3:])), 1), rtol=0, atol=1e-12)
    packed.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    cache = model.new_cache(1, 7)
    steps = torch.cat([model(token, cache=cache) for token in tokens.split(1, 1)], 1)
    torch.testing.assert_close(steps, model(tokens), rtol=0, atol=1e-12)


def test_a_mixer_of_ones_own_is_told_its_block_and_the_spread_of_its_output() -> None:
    first, second = build(layers=2).mixers
    assert isinstance(first, RunningMean)
    assert isinstance(second, RunningMean)
    assert [first.out.std, second.out.std] == pytest.approx([0.5 / math.sqrt(12), 1 / math.sqrt(12)])


def test_a_mixer_of_ones_own_stands_beside_attention_in_a_hybrid() -> None:
    model = build(attention=GQAConfig(num_heads=3), mixers=(RunningMeanConfig(), None))
    tokens, documents = torch.arange(7)[None], torch.tensor([[0] * 3 + [1] * 4])
    alone = torch.cat((model(tokens[:, :3]), model(tokens[:, 3:])), 1)
    torch.testing.assert_close(model(tokens, documents=documents), alone, rtol=0, atol=1e-12)
    assert model.flops_per_token(7) > 0


def test_an_activation_of_ones_own_stands_in_the_gate() -> None:
    feed_forward = build(activation=ReLUConfig()).blocks[0].feed_forward
    x = torch.randn(3, 12, dtype=torch.float64)
    gate, up = (x @ feed_forward.gate_up.weight.T).chunk(2, dim=-1)
    torch.testing.assert_close(feed_forward(x), (gate.relu() * up) @ feed_forward.down.weight.T)


def test_a_state_space_of_ones_own_is_convolved_with() -> None:
    layer = SSMConfig(kernel=DelayConfig()).build(5, out_std=1.0).double()
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    u, gate = layer.project(x).chunk(2, dim=-1)
    before = F.pad(u, (0, 0, 1, 0))[:, :-1]
    torch.testing.assert_close(layer(x), layer.out((before + u) * F.silu(gate)), rtol=0, atol=1e-12)


def test_components_of_ones_own_are_saved_by_their_module_and_those_of_danlu_by_their_name() -> None:
    own = TransformerConfig(attention=RunningMeanConfig(gain=0.5), activation=ReLUConfig())
    tree = configs.to_tree(own)
    assert tree["attention"] == {"type": f"{__name__}:RunningMeanConfig", "gain": 0.5}
    assert configs.from_tree(TransformerConfig, tree) == own
    space = TransformerConfig(attention=SSMConfig(kernel=S4DConfig(state=4)))
    assert configs.to_tree(space)["attention"]["type"] == "SSMConfig"
    assert configs.to_tree(space)["attention"]["kernel"]["type"] == "S4DConfig"
