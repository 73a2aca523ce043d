"""Adapters: the product they add, what is frozen, merging, and their gradients."""

import copy

import pytest
import torch
from tensors import gaussian
from torch import nn

from danlu.models import Transformer, TransformerConfig
from danlu.nn import (
    GQAConfig,
    Linear,
    LoRAConfig,
    LoRAEmbedding,
    LoRALinear,
    MLAConfig,
    MoEConfig,
    apply_lora,
    declare,
    lora_state_dict,
    merge_lora,
)
from danlu.optim import MuonConfig, balanced_ratio, loraplus_groups, param_groups


def randomize(model):
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora" in name:
            parameter.data = gaussian(*parameter.shape, seed=index, dtype=parameter.dtype)
    return model


def small(attention=None):
    attention = attention or GQAConfig(num_heads=3)
    return Transformer(TransformerConfig(vocab_size=17, dim=12, layers=2, hidden=7, attention=attention))


@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 5), lambda: nn.Linear(7, 5, bias=False), lambda: Linear(7, 5)])
def test_the_layer_adds_its_scaled_product(make):
    layer = randomize(LoRALinear(make().double(), LoRAConfig(rank=3, alpha=6)))
    x = gaussian(11, 7)
    expected = layer.base(x) + 2 * (x @ layer.lora_A.mT) @ layer.lora_B.mT
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    bias = getattr(layer.base, "bias", None)
    torch.testing.assert_close(x @ layer.weight.mT + (0 if bias is None else bias), expected, rtol=1e-12, atol=1e-12)


def test_the_stabilized_scale_divides_by_the_root_of_the_rank():
    assert LoRAConfig(rank=16, alpha=8).scale == 0.5
    assert LoRAConfig(rank=16, alpha=8, rank_stabilized=True).scale == 2.0


def test_a_fresh_adapter_changes_nothing_and_its_input_side_keeps_the_size():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(512, 64), LoRAConfig(rank=32))
    assert layer.lora_B.count_nonzero() == 0
    # 512 x 32 draws: the standard error of the estimated variance is 1.1 %.
    assert layer.lora_A.var().item() * 512 == pytest.approx(1, abs=0.045)


def test_the_gradients_are_those_of_finite_differences_and_of_the_closed_form():
    layer = randomize(LoRALinear(nn.Linear(5, 7).double(), LoRAConfig(rank=3, alpha=3)))
    x = gaussian(11, 5).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    y_grad = gaussian(11, 7, seed=5)
    layer(x).backward(y_grad)
    torch.testing.assert_close(layer.lora_A.grad, (y_grad @ layer.lora_B).mT @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.lora_B.grad, y_grad.mT @ (x @ layer.lora_A.mT), rtol=1e-12, atol=1e-12)
    assert layer.base.weight.grad is None


def test_the_embedding_looks_up_the_merged_table():
    layer = randomize(LoRAEmbedding(nn.Embedding(13, 5).double(), LoRAConfig(rank=3)))
    tokens = torch.tensor([[0, 12, 4], [4, 4, 7]])
    torch.testing.assert_close(layer(tokens), nn.functional.embedding(tokens, layer.weight), rtol=1e-12, atol=1e-12)


def test_dropout_acts_in_training_only_and_leaves_the_frozen_path_alone():
    layer = randomize(LoRALinear(nn.Linear(7, 5), LoRAConfig(rank=3, dropout=0.5)))
    x = gaussian(64, 7, dtype=torch.float32)
    torch.manual_seed(0)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(
    "attention",
    [GQAConfig(num_heads=3), MLAConfig(num_heads=3, kv_rank=6, nope_dim=4, rope_dim=2, value_dim=4)],
    ids=["gqa", "mla"],
)
def test_a_transformer_with_adapters_merges_to_one_without(attention):
    torch.manual_seed(0)
    model = small(attention).double()
    keys, tokens = list(model.state_dict()), torch.tensor([[1, 5, 9, 16, 0]])
    before = model(tokens)
    apply_lora(model, LoRAConfig(rank=2))
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)
    adapted = randomize(model)(tokens)
    assert not torch.allclose(adapted, before)
    cached = torch.cat([model(t[None, None], cache=c) for c in [model.new_cache(1, 5)] for t in tokens[0]], 1)
    torch.testing.assert_close(cached, adapted, rtol=1e-9, atol=1e-9)
    merge_lora(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(tokens), adapted, rtol=1e-10, atol=1e-10)


def test_only_adapters_train_and_the_head_keeps_its_plain_weight():
    model = apply_lora(small(), LoRAConfig(rank=2))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(lora_state_dict(model))
    assert not any(name.startswith("head") for name in trainable)
    assert len(trainable) == 2 * 2 * 4  # qkv, out, up, down of two blocks


def test_patterns_choose_the_layers():
    model = apply_lora(small(), LoRAConfig(rank=2, targets=("*.qkv", "*.out"), exclude=("blocks.0.*",)))
    assert {name.rpartition(".")[0] for name in lora_state_dict(model)} == {
        "blocks.1.attention.qkv",
        "blocks.1.attention.out",
    }


def test_the_adapters_alone_restore_a_model():
    torch.manual_seed(0)
    model = small()
    twin = copy.deepcopy(model)
    saved = lora_state_dict(randomize(apply_lora(model, LoRAConfig(rank=2))))
    missing = apply_lora(twin, LoRAConfig(rank=2)).load_state_dict(saved, strict=False)
    assert not missing.unexpected_keys
    tokens = torch.tensor([[3, 1, 4]])
    assert torch.equal(model(tokens), twin(tokens))


def test_a_layer_in_two_places_gets_one_adapter():
    shared = nn.Linear(4, 4)
    model = apply_lora(nn.Sequential(shared, nn.Tanh(), shared), LoRAConfig(rank=2))
    assert model[0] is model[2]
    assert merge_lora(model)[2] is shared


def test_bfloat16_activations_meet_float32_factors():
    layer = randomize(LoRALinear(Linear(7, 5), LoRAConfig(rank=3)))
    assert layer(torch.ones(2, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: LoRAConfig(rank=0), "rank"),
        (lambda: LoRAConfig(alpha=0.0), "alpha"),
        (lambda: LoRAConfig(dropout=1.0), "dropout"),
        (lambda: LoRAConfig(targets=()), "targets"),
        (lambda: apply_lora(nn.Sequential(nn.Linear(3, 3)), LoRAConfig(rank=4)), "rank must be at most"),
        (lambda: apply_lora(nn.Sequential(nn.Tanh())), "targets must match"),
        (lambda: apply_lora(apply_lora(nn.Sequential(nn.Linear(8, 8)))), "an adapter at 0"),
        (lambda: apply_lora(nn.Linear(8, 8)), "is itself"),
        (lambda: merge_lora(nn.Sequential(nn.Linear(8, 8))), "no adapter"),
        (lambda: LoRAEmbedding(nn.Embedding(5, 3, max_norm=1.0), LoRAConfig(rank=2)), "max_norm"),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("kind", [LoRALinear, LoRAEmbedding])
def test_a_layer_of_another_kind_is_rejected(kind):
    with pytest.raises(TypeError, match="base must be"):
        kind(nn.Tanh(), LoRAConfig())


def test_merging_an_adapter_on_a_tied_head_leaves_the_embedding_as_it_was():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    model, tokens = Tied(), torch.arange(11)
    table = model.embedding.weight.detach().clone()
    apply_lora(model, LoRAConfig(rank=2, targets=("head",), exclude=()))
    nn.init.normal_(model.head.lora_B)
    expected = model(tokens)
    merge_lora(model)
    assert torch.equal(model.embedding.weight, table)
    torch.testing.assert_close(model(tokens), expected)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_factors_on_a_base_of_sixteen_bits_are_float32_and_the_result_keeps_its_dtype(kind):
    config = LoRAConfig(rank=2)
    if kind == "linear":
        layer = LoRALinear(nn.Linear(8, 6).bfloat16(), config)
        y = layer(torch.randn(3, 8).bfloat16())
    else:
        layer = LoRAEmbedding(nn.Embedding(8, 6).bfloat16(), config)
        y = layer(torch.arange(3))
    assert y.dtype == torch.bfloat16
    assert {p.dtype for name, p in layer.named_parameters() if name.startswith("lora_")} == {torch.float32}
    assert layer.merged().weight.dtype == torch.bfloat16


def sparse():
    torch.manual_seed(0)
    experts = MoEConfig(num_experts=4, top_k=2, hidden=8)
    return Transformer(TransformerConfig(vocab_size=11, dim=12, layers=2, hidden=8, experts=experts)).double()


def test_a_pattern_that_names_a_parameter_without_a_layer_is_an_error():
    for pattern in ("*router", "embedding"):
        with pytest.raises(ValueError, match="without a layer of its own"):
            apply_lora(sparse(), LoRAConfig(rank=2, targets=("*qkv", pattern), exclude=()))


def test_experts_are_adapted_each_by_its_own_product_and_merge_to_what_they_were():
    model, tokens = sparse(), torch.tensor([[1, 5, 9, 10, 0]])
    names, before, shapes = list(model.state_dict()), model(tokens), [p.shape for p in model.parameters()]
    apply_lora(model, LoRAConfig(rank=2, alpha=6))
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)
    layer = model.blocks[1].feed_forward
    frozen = layer.parametrizations.w_up.original.clone()
    adapted = randomize(model)(tokens)
    assert not torch.allclose(adapted, before)
    A, B = layer.parametrizations.w_up[0].lora_A, layer.parametrizations.w_up[0].lora_B
    expected = torch.stack([frozen[e] + 3 * B[e] @ A[e] for e in range(4)])
    torch.testing.assert_close(layer.w_up, expected, rtol=1e-12, atol=1e-12)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert {name for name in lora_state_dict(model) if "w_" in name} == {
        f"blocks.1.feed_forward.parametrizations.{weight}.0.lora_{factor}"
        for weight in ("w_up", "w_down")
        for factor in "AB"
    }
    merge_lora(model)
    assert list(model.state_dict()) == names
    assert [p.shape for p in model.parameters()] == shapes
    torch.testing.assert_close(model(tokens), adapted, rtol=1e-10, atol=1e-10)


def test_adapters_of_experts_learn_and_have_the_roles_and_rates_of_factors():
    model = apply_lora(sparse(), LoRAConfig(rank=2, targets=("*w_down", "*w_up")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = param_groups(model)
    assert {(group["role"], p.shape) for group in groups for p in group["params"]} == {
        ("experts", shape) for shape in [(4, 2, 12), (4, 16, 2), (4, 2, 8), (4, 12, 2)]
    }
    rates = {n: g["lr_factor"] for g in loraplus_groups(model, 1e-3, "auto") for n in g["param_names"]}
    (rate,) = [rate for name, rate in rates.items() if name.endswith("w_down.0.lora_B")]
    assert rate == pytest.approx(balanced_ratio(8, 12, 2))
    optimizer = MuonConfig(lr=0.1, dtype="float32").build(model)
    model(torch.tensor([[1, 5, 9]])).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= set(lora_state_dict(model))
    assert {name for name in changed if name.endswith("lora_B")}


def test_a_stack_with_inputs_first_gets_factors_of_its_own_orientation():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, 5, 7).double())  # from 5 features to 7
            declare(self, "w", "experts", transposed=True)

    layer = randomize(apply_lora(Experts(), LoRAConfig(rank=2, alpha=2)))
    factors = layer.parametrizations.w[0]
    assert factors.lora_A.shape == (3, 2, 5)
    assert factors.lora_B.shape == (3, 7, 2)
    torch.testing.assert_close(layer.w.mT, factors.lora_B @ factors.lora_A)


def test_a_stack_of_sixteen_bits_or_of_a_smaller_rank_is_refused_by_name():
    with pytest.raises(TypeError, match=r"blocks\.1\.feed_forward\.w_up is a stack of experts in torch\.bfloat16"):
        apply_lora(sparse().bfloat16(), LoRAConfig(rank=2))
    assert apply_lora(sparse().bfloat16(), LoRAConfig(rank=2, exclude=("*.w_up", "*.w_down")))
    with pytest.raises(ValueError, match=r"the smaller size of blocks\.1\.feed_forward\.w_up, \(4, 16, 12\), got 13"):
        apply_lora(sparse(), LoRAConfig(rank=13, targets=("*.w_up",)))


def test_a_stack_that_is_used_elsewhere_stays_as_it_is_there():
    model = nn.ModuleList([sparse().blocks[1].feed_forward for _ in range(2)])
    model[1].w_up = model[0].w_up
    table = model[0].w_up.detach().clone()
    randomize(apply_lora(model, LoRAConfig(rank=2, targets=("0.w_up",))))
    merge_lora(model)
    assert torch.equal(model[1].w_up, table)
    assert not torch.equal(model[0].w_up, table)


def test_a_merged_embedding_is_a_frozen_leaf():
    layer = LoRAEmbedding(nn.Embedding(7, 5), LoRAConfig(rank=2))
    nn.init.normal_(layer.lora_embedding_A)
    expected = layer.weight.detach().clone()
    merged = layer.merged()
    assert torch.equal(merged.weight, expected)
    assert merged.weight.is_leaf
    assert not merged.weight.requires_grad
