"""Adapters, quantized, pruned and sharded layers take part wherever a formula needs the matrix of a layer."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from tensors import int8_products_saturate
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig, Linear, LoRAConfig, LoRALinear, MLAConfig, as_torch_linear
from danlu.nn.effective import effective_weight, is_plain
from danlu.objectives import CausalLM
from danlu.protocols import MixerConfig

TOKENS = torch.arange(26).view(2, 13) * 7 % 31
MLA = MLAConfig(num_heads=2, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=12)
both = pytest.mark.parametrize("attention", [GQAConfig(num_heads=2), MLA], ids=["gqa", "mla"])


def model(attention: MixerConfig = MLA) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(vocab_size=31, dim=16, layers=2, hidden=24, attention=attention)).eval()


def decoded(m: nn.Module, cache_of: Transformer) -> Tensor:
    """Logits of one token after the other."""
    cache = cache_of.new_cache(*TOKENS.shape)
    return torch.cat([m(token, cache=cache) for token in TOKENS.split(1, dim=1)], dim=1)


def adapted(names: list[str], m: Transformer) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()


def test_an_adapter_on_the_latents_map_takes_part_in_decoding() -> None:
    m = model()
    plain = m(TOKENS)
    changed = adapted(["kv_up"], m)
    with torch.no_grad():
        assert not torch.allclose(changed(TOKENS), plain, atol=1e-2)
        torch.testing.assert_close(decoded(changed, m), changed(TOKENS), rtol=1e-4, atol=1e-5)


def test_an_adapter_on_the_head_takes_part_in_logits_and_loss() -> None:
    m = model()
    plain = m(TOKENS)
    changed = adapted(["head"], m)
    assert not torch.allclose(changed(TOKENS), plain, atol=1e-2)
    batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}
    expected = nn.functional.cross_entropy(
        changed(batch["tokens"]).flatten(0, 1), batch["targets"].flatten(), reduction="sum"
    )
    loss = CausalLM(m)(batch)
    torch.testing.assert_close(loss, expected)
    factors = [p for p in m.parameters() if p.requires_grad]
    assert len(factors) == 2
    for one, other in zip(torch.autograd.grad(loss, factors), torch.autograd.grad(expected, factors)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize(
    ("kind", "near"),
    [("Int8WeightOnlyConfig", 1e-4), ("Float8WeightOnlyConfig", 1e-4), ("Int8DynamicActivationInt8WeightConfig", 0.1)],
)
def test_a_model_quantized_by_torchao_decodes(attention: MixerConfig, kind: str, near: float) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    m = model(attention)
    with torch.no_grad():
        plain = m(TOKENS)
        quantization.quantize_(m, getattr(quantization, kind)())
        loose = kind == "Int8DynamicActivationInt8WeightConfig" and int8_products_saturate()
        assert 0 < (m(TOKENS) - plain).norm() < (0.6 if loose else 0.1) * plain.norm()
        assert (decoded(m, m) - m(TOKENS)).norm() < (0.6 if loose else near) * plain.norm()
        loss = CausalLM(m)({"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]})
        expected = CausalLM(model(attention))({"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]})
    torch.testing.assert_close(loss, expected, rtol=0.2 if loose else 0.05, atol=0)


@both
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_dynamically_quantized_model_decodes(attention: MixerConfig) -> None:
    m = as_torch_linear(model(attention))
    with torch.no_grad():
        plain = m(TOKENS)
        quantized = torch.ao.quantization.quantize_dynamic(m, {nn.Linear})
        assert 0 < (quantized(TOKENS) - plain).norm() < 0.1 * plain.norm()
        assert (decoded(quantized, quantized) - quantized(TOKENS)).norm() < 0.1 * plain.norm()


def test_a_pruned_head_is_pruned_and_its_hooks_are_called() -> None:
    m = model()
    assert m.head is not None
    prune.l1_unstructured(m.head, "weight", amount=0.5)
    with torch.no_grad():
        m.head.weight_orig.mul_(2)  # as a step of an optimizer changes it
        expected = nn.functional.linear(m.hidden(TOKENS), m.head.weight_orig * m.head.weight_mask)
        torch.testing.assert_close(m(TOKENS), expected)
        torch.testing.assert_close(m.head_weight, m.head.weight_orig * m.head.weight_mask)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_layers_that_are_sharded_each_by_itself_decode(mesh: DeviceMesh) -> None:
    m, whole = model(), model()
    for layer in [layer for layer in m.modules() if isinstance(layer, Linear)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(m, mesh=mesh)
    with torch.no_grad():
        torch.testing.assert_close(decoded(m, whole), decoded(whole, whole))


@pytest.mark.parametrize(
    "make",
    [lambda: Linear(3, 4), lambda: nn.Linear(3, 4, bias=False), lambda: LoRALinear(Linear(3, 4), LoRAConfig(rank=2))],
    ids=["Linear", "torch", "LoRA"],
)
def test_a_plain_layer_gives_its_weight_and_is_not_called(make: Callable[[], nn.Module]) -> None:
    layer = make()
    layer.register_forward_hook(lambda *_: pytest.fail("the layer was called"))
    assert torch.equal(effective_weight(layer, 3, like=torch.empty(0)), layer.weight)


def test_what_is_no_matrix_is_refused() -> None:
    layer = nn.Linear(3, 4)
    assert not is_plain(layer)
    with pytest.raises(ValueError, match="adds a bias"):
        effective_weight(layer, 3, like=layer.weight)
