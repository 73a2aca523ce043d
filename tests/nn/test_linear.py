"""The linear map as a ``torch.nn.Linear``: what looks for those finds it, and gets what it expects."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from danlu.models import Transformer, TransformerConfig
from danlu.nn import FeedForward, GQAConfig, Linear, as_torch_linear


def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(vocab_size=32, dim=16, layers=1, hidden=32, attention=GQAConfig(num_heads=2)))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_it_is_a_linear_layer_of_pytorch_with_the_weight_it_always_had() -> None:
    layer = Linear(5, 3)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert list(layer.state_dict()) == ["weight"]
    torch.manual_seed(0)
    drawn = Linear(5, 3, std=0.5).weight
    torch.manual_seed(0)
    assert torch.equal(drawn, nn.init.normal_(torch.empty(3, 5), std=0.5))


def test_tensor_parallelism_takes_whole_weights_and_refuses_to_mix_the_parts_of_fused_ones(mesh: DeviceMesh) -> None:
    m = model()
    parallelize_module(m.blocks[0], mesh, {"feed_forward.down": RowwiseParallel(), "attention.out": RowwiseParallel()})
    assert isinstance(m.blocks[0].feed_forward.down.weight, DTensor)  # type: ignore[union-attr]
    for fused in ("feed_forward.gate_up", "attention.qkv"):
        with pytest.raises(ValueError, match="fused of"):
            parallelize_module(m.blocks[0], mesh, {fused: ColwiseParallel()})
    plain = FeedForward(8, 4)
    parallelize_module(plain, mesh, {"down": ColwiseParallel()})
    assert isinstance(plain.down.weight, DTensor)


def test_fully_shard_may_cut_fused_weights_since_it_puts_them_together_again(mesh: DeviceMesh) -> None:
    m, tokens = model(), torch.arange(8)[None]
    expected = m(tokens)
    fully_shard(m, mesh=mesh)
    torch.testing.assert_close(m(tokens), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantization_takes_the_plain_layers_of_the_same_weights() -> None:
    m, tokens = model(), torch.arange(8)[None]
    weights, expected = {id(p) for p in m.parameters()}, m(tokens)
    as_torch_linear(m)
    assert {id(p) for p in m.parameters()} == weights
    assert torch.equal(m(tokens), expected)
    layers = [name for name, layer in m.named_modules() if type(layer) is nn.Linear]
    assert layers == [
        "blocks.0.attention.qkv",
        "blocks.0.attention.out",
        "blocks.0.feed_forward.gate_up",
        "blocks.0.feed_forward.down",
        "head",
    ]
    quantized = torch.ao.quantization.quantize_dynamic(m.eval(), {nn.Linear}, inplace=False)
    assert not any(type(layer) is nn.Linear for layer in quantized.modules())


def test_torchao_converts_every_linear_layer() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="quantization needs torchao")
    m, tokens = model().eval(), torch.arange(8)[None]
    with torch.no_grad():
        expected = m(tokens)
        quantization.quantize_(m, quantization.Int8WeightOnlyConfig())
        layers = [layer for layer in m.modules() if isinstance(layer, nn.Linear)]
        assert len(layers) == 5
        assert all(type(layer.weight) is not nn.Parameter for layer in layers)
        found = m(tokens)
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_peft_adapts_every_linear_layer() -> None:
    peft = pytest.importorskip("peft", reason="adapters of PEFT need it")
    m, tokens = model(), torch.arange(8)[None]
    expected = m(tokens)
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["qkv", "out", "gate_up", "down"]), m)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 4
    torch.testing.assert_close(adapted(tokens), expected)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert not torch.allclose(adapted(tokens), expected)
