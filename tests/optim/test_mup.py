"""The spectral condition: norms at initialisation, rates by shape and role, Muon's rate from AdamW's."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from danlu.models import Transformer, TransformerConfig
from danlu.nn import GQAConfig, MoEConfig
from danlu.optim import (
    AdamWConfig,
    Muon,
    check_partition,
    declare,
    muon_from_adamw,
    mup_factor,
    mup_groups,
    shape_scale,
    spectral_init_,
    spectral_std,
)
from danlu.recipes import load


def norm(M):
    return torch.linalg.matrix_norm(M.detach(), 2).item()


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (1024, 256), (256, 1024), (2048, 67)])
def test_a_gaussian_matrix_of_that_deviation_has_the_target_norm(rows, columns):
    M = torch.randn(rows, columns, generator=seeded()) * spectral_std(rows, columns)
    # The edge lies below sqrt(m) + sqrt(n) by about n^(-2/3) of it: 6 % at 64, 1 % at 1024.
    assert norm(M) / math.sqrt(rows / columns) == pytest.approx(1, abs=min(rows, columns) ** (-2 / 3))


def test_the_deviation_is_between_half_of_and_all_of_the_familiar_one():
    for rows, columns in [(7, 7), (7, 7000), (7000, 7), (512, 128)]:
        familiar = math.sqrt(min(1, rows / columns) / columns)
        assert 0.5 <= spectral_std(rows, columns) / familiar <= 1
    assert spectral_std(7, 7) * 2 == pytest.approx(7**-0.5)


def test_the_published_table_of_exponents_follows_from_the_shapes():
    # Input, hidden and output layer of width d; powers of d of the variance, and of the rates of Adam and of Muon.
    d, D = 1000, 8000
    layers = {"input": lambda d: (d, 1), "hidden": lambda d: (d, d), "output": lambda d: (1, d)}

    def power(function, shape):
        return math.log(function(*shape(D)) / function(*shape(d))) / math.log(D / d)

    variance = {name: power(lambda m, n: spectral_std(m, n) ** 2, shape) for name, shape in layers.items()}
    assert variance == {
        "input": pytest.approx(0, abs=0.05),
        "hidden": pytest.approx(-1),
        "output": pytest.approx(-2, abs=0.05),
    }
    adam = {name: power(lambda m, n: mup_factor(m, n, 64), shape) for name, shape in layers.items()}
    assert adam == {"input": 0, "hidden": pytest.approx(-1), "output": pytest.approx(-1)}
    sgd = {name: power(lambda m, n: mup_factor(m, n, 64, "sgd"), shape) for name, shape in layers.items()}
    assert sgd == {"input": pytest.approx(1), "hidden": 0, "output": pytest.approx(-1)}
    muon = {name: power(lambda m, n: shape_scale("mup", m, n), shape) for name, shape in layers.items()}
    assert muon == {"input": pytest.approx(0.5), "hidden": 0, "output": pytest.approx(-0.5)}


@pytest.mark.parametrize(("width", "factor"), [(1024, 6.4), (2048, 9.05), (4096, 12.8)])
@pytest.mark.parametrize("scale", ["plain", "jordan", "mup"])
def test_muons_rate_from_adamws_is_the_published_factor_for_square_matrices(width, factor, scale):
    lr, decay = muon_from_adamw(1e-3, 0.1, (width, width), scale)
    assert lr == pytest.approx(factor * 1e-3, rel=1e-3)
    assert lr * decay == pytest.approx(1e-4, rel=1e-12)


@pytest.mark.parametrize("scale", ["moonlight", "rms"])
def test_the_scales_made_for_adamws_rate_leave_it(scale):
    assert muon_from_adamw(1e-3, 0.1, (300, 70), scale) == (1e-3, 0.1)


@pytest.mark.parametrize("shape", [(30, 70), (70, 30), (50, 50)])
@pytest.mark.parametrize("scale", ["plain", "jordan", "mup"])
def test_a_step_at_the_converted_rate_is_the_moonlight_step(shape, scale):
    ends = []
    for name, (lr, decay) in {
        "moonlight": (0.01, 0.1),
        scale: muon_from_adamw(0.01, 0.1, shape, scale),
    }.items():
        weight = nn.Parameter(torch.randn(shape, generator=seeded(), dtype=torch.float64))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        Muon([weight], lr=lr, weight_decay=decay, scale=name).step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def model():
    return Transformer(
        TransformerConfig(
            vocab_size=200,
            dim=64,
            layers=2,
            hidden=48,
            attention=GQAConfig(num_heads=4, num_kv_heads=2),
            experts=MoEConfig(num_experts=3, top_k=2, hidden=40),
        )
    )


def test_every_map_of_a_transformer_gets_its_norm_each_fused_part_apart():
    network = spectral_init_(model(), generator=seeded())
    block = network.blocks[1]
    query, key, value = block.attention.qkv.weight.split((64, 32, 32))
    for part in (query, key, value, block.attention.out.weight, network.head.weight):
        assert norm(part) / math.sqrt(part.shape[0] / part.shape[1]) == pytest.approx(1, abs=0.12)
    for expert in (*block.feed_forward.w_up.chunk(2, dim=1)[0], *block.feed_forward.w_down):
        assert norm(expert) / math.sqrt(expert.shape[0] / expert.shape[1]) == pytest.approx(1, abs=0.12)
    assert network.embedding.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(block.attention_norm.weight, torch.ones(64))


def test_the_gain_multiplies_the_norm_of_the_matrix_it_names():
    plain = spectral_init_(model(), generator=seeded())
    gained = spectral_init_(model(), gain=lambda name: 0.5 if name == "head.weight" else 1.0, generator=seeded())
    torch.testing.assert_close(gained.head.weight, 0.5 * plain.head.weight)
    assert torch.equal(gained.blocks[0].attention.out.weight, plain.blocks[0].attention.out.weight)


def test_a_convolution_counts_its_kernel_as_columns():
    layer = spectral_init_(nn.Conv2d(16, 96, 3, groups=2), generator=seeded())
    for group in layer.weight.chunk(2):
        assert norm(group.flatten(1)) / math.sqrt(48 / 72) == pytest.approx(1, abs=0.12)


def test_a_transposed_convolution_maps_an_input_to_all_that_it_writes():
    layer = spectral_init_(nn.ConvTranspose2d(48, 32, 2, groups=2), generator=seeded())
    for group in layer.weight.chunk(2):
        assert norm(group.flatten(1)) / math.sqrt(64 / 24) == pytest.approx(1, abs=0.12)
    groups = {group["role"]: group for group in mup_groups(layer, 0.1, 12)}
    assert groups["conv"]["lr"] == pytest.approx(0.1 * 12 / 24)
    assert mup_groups(layer, 0.1, 12, rule="sgd")[0]["lr"] == pytest.approx(0.1 * 64 / 24)


def test_rates_follow_the_columns_under_adam():
    network = model()
    groups = mup_groups(network, 0.1, 32, weight_decay=0.3)
    check_partition(groups, network)
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rates["blocks.0.attention.qkv.weight"] == pytest.approx(0.05)
    assert rates["blocks.0.feed_forward.down.weight"] == pytest.approx(0.1 * 32 / 48)
    assert rates["blocks.1.feed_forward.w_down"] == pytest.approx(0.1 * 32 / 40)
    assert rates["head.weight"] == pytest.approx(0.05)
    assert rates["embedding"] == rates["norm.weight"] == 0.1


def test_the_product_of_rate_and_decay_is_the_same_for_every_group_that_decays():
    for rule in ("adam", "sgd"):
        for group in mup_groups(model(), 0.1, 32, rule=rule, weight_decay=0.3):
            product = group["lr"] * group["weight_decay"]
            assert product == (0 if group["role"] in ("gain", "bias") else pytest.approx(0.03, rel=1e-12))


def test_rates_follow_the_shape_under_gradient_descent():
    network = model()
    groups = mup_groups(network, 0.1, 32, rule="sgd")
    check_partition(groups, network)
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rates["blocks.0.attention.out.weight"] == pytest.approx(0.1)
    assert rates["head.weight"] == pytest.approx(0.1 * 200 / 64)
    assert rates["embedding"] == rates["norm.weight"] == pytest.approx(0.2)


def test_the_base_width_takes_the_rate_itself():
    square = nn.Sequential(nn.Linear(32, 32, bias=False))
    assert mup_groups(square, 0.1, 32)[0]["lr"] == 0.1
    assert mup_groups(square, 0.1, 32, rule="sgd")[0]["lr"] == 0.1


def test_groups_of_one_factor_stay_one_group():
    assert len(mup_groups(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), 0.1, 8)) == 2  # matrices, biases


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: spectral_std(0, 3), ValueError, "rows"),
        (lambda: mup_factor(3, 3, 0), ValueError, "base_width"),
        (lambda: mup_factor(3, 3, 8, "adamw"), ValueError, "did you mean 'adam'"),
        (lambda: muon_from_adamw(-1.0, 0.1, (3, 3)), ValueError, "lr"),
        (lambda: muon_from_adamw(1e-3, 0.1, (3, 3, 3)), ValueError, "shape"),
        (lambda: muon_from_adamw(1e-3, 0.1, (3, 3), "moon"), ValueError, "scale"),
        (lambda: mup_groups(nn.Linear(3, 3), 0.0, 3), ValueError, "lr"),
        (lambda: mup_groups(nn.Linear(3, 3), 0.1, 3, weight_decay=-1), ValueError, "weight_decay"),
        (lambda: mup_groups("model", 0.1, 3), TypeError, "model"),
    ],
)
def test_bad_input_is_named(act, error, message):
    with pytest.raises(error, match=message):
        act()


def test_a_weight_kept_as_inputs_by_outputs_has_the_norm_and_the_rates_of_its_transpose():
    layer = nn.Linear(1024, 256, bias=False)  # read as 256 inputs and 1024 outputs, in two blocks
    declare(layer, "weight", "matrix", 2, transposed=True)
    spectral_init_(layer, generator=seeded())
    for block in layer.weight.mT.split(512):
        assert norm(block) == pytest.approx(math.sqrt(512 / 256), rel=0.05)
    (group,) = mup_groups(layer, 1e-2, base_width=128)
    assert group["lr"] == pytest.approx(1e-2 * 128 / 256)
    (group,) = mup_groups(layer, 1e-2, base_width=128, rule="sgd")
    assert group["lr"] == pytest.approx(1e-2 * 512 / 256)


def test_a_configuration_with_a_base_width_takes_these_groups() -> None:
    network = nn.Sequential(nn.Embedding(11, 64), nn.Linear(64, 64), nn.Linear(64, 128, bias=False))
    config = AdamWConfig(lr=0.1, weight_decay=0.3, mup_base_width=16)
    found = {name: group for group in config.build(network).param_groups for name in group["param_names"]}
    expected = {name: g for g in mup_groups(network, 0.1, 16, weight_decay=0.3) for name in g["param_names"]}
    assert {name: group["lr"] for name, group in found.items()} == {name: g["lr"] for name, g in expected.items()}
    assert found["1.weight"]["lr"] == found["2.weight"]["lr"] == 0.1 * 16 / 64
    assert found["1.weight"]["weight_decay"] == pytest.approx(0.3 * 64 / 16)
    assert found["1.bias"]["weight_decay"] == 0
    with pytest.raises(ValueError, match="mup_base_width"):
        AdamWConfig(mup_base_width=0)


def test_the_recipe_is_lm_dense_adamw_at_its_own_width_and_takes_half_the_rate_at_twice_the_width() -> None:
    def rates(name: str, dim: int) -> dict[str, float]:
        config = load(name)
        with torch.device("meta"):
            network = replace(config.model, dim=dim).build()
        groups = config.optim.build(network).param_groups
        return {name: group["lr"] for group in groups for name in group["param_names"]}

    plain, here, wide = rates("lm-dense-adamw", 256), rates("lm-dense-mup", 256), rates("lm-dense-mup", 512)
    assert here["head.weight"] == plain["head.weight"] == 2 * wide["head.weight"]
    assert here["blocks.0.attention.qkv.weight"] == plain["blocks.0.attention.qkv.weight"]
    assert wide["blocks.0.attention.qkv.weight"] == plain["blocks.0.attention.qkv.weight"] / 2
    assert wide["embedding"] == plain["embedding"]


def test_a_seed_draws_the_same_start_whatever_was_drawn_elsewhere():
    starts = []
    for _ in range(2):
        network = spectral_init_(nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3, bias=False)), generator=seeded())
        starts.append([parameter.detach().clone() for parameter in network.parameters()])
        torch.rand(3)
    assert all(map(torch.equal, *starts))
