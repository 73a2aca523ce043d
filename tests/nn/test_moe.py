"""The expert layer: routing, gates, shared experts and factors, beside the written-out sum and two published layers."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from danlu.nn import AuxiliaryLossConfig, DynamicConfig, LossFreeConfig, MoE, MoEConfig, balanced_load, scaling_factor
from danlu.nn.grouped import routed_experts

from .expert_sums import random, written_out


def build(**changes: object) -> MoE:
    torch.manual_seed(5)
    sizes: dict[str, object] = {"num_experts": 7, "top_k": 3, "hidden": 5, "num_shared_experts": 2}
    return MoE(11, MoEConfig(**(sizes | changes))).double()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_shared_experts": 0},
        {"gate": "softmax", "renormalize": False},
        {"top_k": 1},
        {"top_k": 7},
        {"scale": 1.75},
        {"gate": "relu", "renormalize": False},
        {"gate": "softmax", "select_by": "sigmoid"},
    ],
)
def test_layer_is_shared_experts_plus_the_gated_sum_over_chosen_ones(changes: dict[str, object]) -> None:
    layer, x = build(**changes), random(13, 11)
    c = layer.config
    logits = x @ layer.router.T
    scores = {"sigmoid": torch.sigmoid, "softmax": lambda z: z.softmax(-1), "relu": F.relu}[c.gate](logits)
    values, chosen = scores.topk(c.top_k, -1)
    gate = values / values.sum(-1, keepdim=True) if c.renormalize else values
    expected = layer.scale * written_out(x, gate, chosen, layer.w_up, layer.w_down)
    if layer.shared is not None:
        expected = expected + layer.shared(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_equal_experts_make_the_layer_dense() -> None:
    layer, x = build(num_shared_experts=0, scale=1.0), random(13, 11)
    layer.w_up.data[:] = layer.w_up.data[0]
    layer.w_down.data[:] = layer.w_down.data[0]
    first, second = (x @ layer.w_up[0].T).chunk(2, -1)
    torch.testing.assert_close(layer(x), (F.silu(first) * second) @ layer.w_down[0].T, rtol=1e-12, atol=1e-12)


def test_splitting_experts_keeps_total_and_active_parameters() -> None:
    def stack(experts: int, active: int, hidden: int) -> tuple[int, int]:
        layer = MoE(12, MoEConfig(num_experts=experts, top_k=active, hidden=hidden, num_shared_experts=0))
        total = layer.w_up.numel() + layer.w_down.numel()
        return total, total * active // experts

    assert stack(8, 2, 24) == stack(16, 4, 12) == stack(32, 8, 6)


@pytest.mark.parametrize(
    ("arguments", "value", "tolerance"),
    [
        ((160, 6, 2, "softmax", False), 16.02, 0.15),  # DeepSeek-V2; 162 experts, 8 active counting shared ones
        ((256, 8, 1, "sigmoid", True), 2.827, 0.001),  # DeepSeek-V3
        ((64, 6, 0, "sigmoid", True), 2.4463, 0.001),  # Moonlight as published, without the shared experts' sqrt(2)
        ((64, 6, 2, "sigmoid", True), 3.4595, 0.002),  # Moonlight with it
        ((64, 6, 2, "softmax", False), 9.15, 0.1),  # DeepSeek-V2-Lite, which ships 1.0
    ],
)
def test_scaling_factor_reproduces_the_published_models(
    arguments: tuple[int, int, int, str, bool], value: float, tolerance: float
) -> None:
    assert scaling_factor(*arguments) == pytest.approx(value, abs=tolerance)


def test_selection_bias_enters_neither_output_nor_gradient() -> None:
    layer, x = build(), random(13, 11)
    _, chosen = layer.route(x)
    layer.balancer.bias += 0.37  # a constant changes no choice
    y = layer(x)
    assert torch.equal(layer.route(x)[1], chosen)
    layer.balancer.bias.zero_()
    assert torch.equal(layer(x), y)
    assert not layer.balancer.bias.requires_grad


def test_selection_bias_changes_the_choice_but_not_the_gate_of_an_expert() -> None:
    layer, x = build(renormalize=False), random(13, 11)
    layer.balancer.bias[4] = 10.0
    gate, chosen = layer.route(x)
    assert (chosen == 4).any(-1).all()
    expected = layer.scale * (x @ layer.router.T).sigmoid().gather(-1, chosen)
    torch.testing.assert_close(gate, expected, rtol=1e-12, atol=0)


def test_evaluation_counts_no_tokens() -> None:
    layer = build().eval()
    layer(random(13, 11))
    assert layer.balancer.counts.sum() == 0


def test_a_token_that_is_nan_leaves_the_others_alone() -> None:
    layer, x = build(), random(13, 11)
    clean = layer(x)
    x[5] = torch.nan
    dirty = layer(x)
    keep = torch.arange(13) != 5
    torch.testing.assert_close(dirty[keep], clean[keep], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 8}, "top_k must be an integer from 1 to 7"),
        ({"num_experts": 0}, "num_experts"),
        ({"hidden": 0}, "hidden"),
        ({"num_shared_experts": -1}, "num_shared_experts"),
        ({"scale": 0.0}, "scale"),
        ({"gate": "sigmod"}, "did you mean 'sigmoid'"),
        ({"num_groups": 3}, "num_groups must divide"),
        ({"num_groups": 7, "top_k_groups": 2}, "top_k must be at most 2"),
        ({"select_by": "softmax"}, "select_by"),
        ({"balance": AuxiliaryLossConfig(target=(1.0, 2.0))}, "target must name a load for each of 7"),
        ({"balance": DynamicConfig(), "gate": "softmax"}, "dynamic number of experts needs gate"),
        ({"balance": DynamicConfig(), "top_k": 7}, "top_k must be below"),
    ],
)
def test_impossible_fields_are_rejected_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize(("changes", "message"), [({"rate": -1.0}, "rate"), ({"rule": "sing"}, "did you mean 'sign'")])
def test_impossible_balancing_is_rejected_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossFreeConfig(**changes)  # type: ignore[arg-type]


def test_decoding_one_token_equals_the_training_path() -> None:
    layer, x = build(), random(5, 11)
    together = layer(x)
    with torch.no_grad():
        alone = torch.cat([layer(row) for row in x.split(1)])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


def test_relu_gate_has_its_own_factor() -> None:
    # Two experts, both chosen, no renormalisation: E[1 / |relu(z)|] diverges; with it, gates (g, 1 - g) are bounded.
    value = scaling_factor(64, 6, 1, "relu", True)
    assert scaling_factor(64, 6, 1) > value > 0.9 * 6**0.5  # ReLU scores spread more, so fewer experts carry the norm


def test_orthogonal_experts_are_best_left_out_by_their_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator)).Q[:8]
    for _ in range(20):
        v = basis * torch.randn(8, 1, dtype=torch.float64, generator=generator).exp()
        by_norm = set(v.norm(dim=-1).topk(3).indices.tolist())
        errors = {
            chosen: v[[i for i in range(8) if i not in chosen]].sum(0).square().sum().item()
            for chosen in itertools.combinations(range(8), 3)
        }
        assert by_norm == set(min(errors, key=errors.__getitem__))


def test_normalised_experts_do_not_care_for_the_size_of_their_last_layer() -> None:
    layer, x = (
        build(normalize_experts=True, renormalize=False, gate="relu", num_shared_experts=0, scale=1.0),
        random(13, 11),
    )
    y = layer(x)
    layer.w_down.data[3] *= 100.0
    torch.testing.assert_close(layer(x), y, rtol=1e-8, atol=1e-8)  # the eps of the norm is 1e-12 of a mean square
    plain = build(num_shared_experts=0)
    before = plain(x)
    plain.w_down.data[3] *= 100.0
    assert (plain(x) - before).abs().max() > 1


def test_group_limited_choice_stays_within_the_best_groups_even_with_negative_scores() -> None:
    layer, x = build(num_experts=12, top_k=4, num_groups=4, top_k_groups=2, num_shared_experts=0), random(50, 11)
    layer.balancer.bias -= 5.0  # every biased score is negative: masking with 0 would choose outside
    _, chosen = layer.route(x)
    scores = (x @ layer.router.T).sigmoid().view(50, 4, 3)
    best = scores.topk(2, -1).values.sum(-1).topk(2, -1).indices
    assert ((chosen // 3)[:, :, None] == best[:, None]).any(-1).all()


def test_routing_and_layer_equal_deepseek_v3() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        hidden_size=24,
        moe_intermediate_size=10,
        n_routed_experts=16,
        num_experts_per_tok=5,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    config._experts_implementation = "eager"
    theirs = DeepseekV3MoE(config).double()
    ours = MoE(
        24, MoEConfig(num_experts=16, top_k=5, hidden=10, num_shared_experts=2, num_groups=4, top_k_groups=2, scale=2.5)
    ).double()
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router)
        bias = torch.randn(16, dtype=torch.float64) / 4
        theirs.gate.e_score_correction_bias.copy_(bias)
        ours.balancer.bias.copy_(bias)
        theirs.experts.gate_up_proj.copy_(ours.w_up)
        theirs.experts.down_proj.copy_(ours.w_down)
        assert ours.shared is not None
        gate, up = ours.shared.gate_up.weight.chunk(2)
        theirs.shared_experts.gate_proj.weight.copy_(gate)
        theirs.shared_experts.up_proj.weight.copy_(up)
        theirs.shared_experts.down_proj.weight.copy_(ours.shared.down.weight)
    x = torch.randn(2, 31, 24, dtype=torch.float64)
    _, weights, indices = theirs.gate(x)
    # Their router rounds to float32; the choice is the same and the output agrees to that rounding.
    gate, chosen = ours.route(x.view(-1, 24))
    assert torch.equal(chosen.sort(-1).values, indices.sort(-1).values)
    torch.testing.assert_close(gate.sort(-1).values, weights.double().sort(-1).values, rtol=1e-6, atol=0)
    # With their weights of the choices in our dispatch the rest of the layer agrees to float64.
    routed = routed_experts(x.view(-1, 24), weights.double(), indices, ours.w_up, ours.w_down)
    torch.testing.assert_close(routed.view_as(x) + ours.shared(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_layer_equals_qwen3_moe() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=24, moe_intermediate_size=10, num_experts=11, num_experts_per_tok=3, norm_topk_prob=True
    )
    config._experts_implementation = "eager"
    theirs = Qwen3MoeSparseMoeBlock(config).double()
    ours = MoE(
        24,
        MoEConfig(
            num_experts=11,
            top_k=3,
            hidden=10,
            num_shared_experts=0,
            gate="softmax",
            scale=1.0,
            balance=AuxiliaryLossConfig(),
        ),
    ).double()
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router)
        theirs.experts.gate_up_proj.copy_(ours.w_up)
        theirs.experts.down_proj.copy_(ours.w_down)
    x = torch.randn(2, 31, 24, dtype=torch.float64)
    _, weights, indices = theirs.gate(x.view(-1, 24))
    gate, chosen = ours.route(x.view(-1, 24))
    assert torch.equal(chosen, indices)
    torch.testing.assert_close(gate, weights.double(), rtol=1e-6, atol=0)  # their softmax is in float32
    routed = routed_experts(x.view(-1, 24), weights.double(), indices, ours.w_up, ours.w_down)
    torch.testing.assert_close(routed.view_as(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_nan_scores_of_a_dynamic_layer_stay_with_their_token() -> None:
    layer, x = build(balance=DynamicConfig()), random(13, 11)
    clean = layer(x)
    x[5] = torch.nan
    dirty = layer(x)
    keep = torch.arange(13) != 5
    torch.testing.assert_close(dirty[keep], clean[keep], rtol=1e-12, atol=1e-12)
    assert dirty[5].isnan().all()


def test_state_goes_round_and_the_layer_can_be_made_without_memory() -> None:
    layer, x = build(balance=DynamicConfig()), random(13, 11)
    layer.balancer.bias += 0.125
    with torch.device("meta"):
        other = MoE(11, layer.config)
    other = other.to_empty(device="cpu").double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_the_router_decides_in_float32_under_autocast_too() -> None:
    torch.manual_seed(0)
    layer = MoE(64, MoEConfig(num_experts=16, top_k=2, hidden=8))
    x = torch.randn(512, 64)
    gate, chosen = layer.route(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, under = layer.route(x)
    assert torch.equal(under, chosen)
    assert torch.equal(again, gate)


@pytest.mark.parametrize(("num_experts", "top_k", "shared"), [(6, 2, 1), (7, 3, 2), (5, 5, 0), (8, 1, 2)])
def test_balanced_load_is_the_share_of_tokens_where_every_expert_is_chosen_equally_often(
    num_experts: int, top_k: int, shared: int
) -> None:
    torch.manual_seed(0)
    config = MoEConfig(num_experts=num_experts, top_k=top_k, num_shared_experts=shared, hidden=3)
    layer = MoE(num_experts, config).double()
    with torch.no_grad():
        layer.router.copy_(torch.eye(num_experts))
    token = torch.zeros(num_experts, dtype=torch.float64)
    token[:top_k] = torch.linspace(1, 2, top_k)
    tokens = torch.stack([token.roll(turn) for turn in range(num_experts)])
    _, chosen = layer.route(tokens)
    counts = torch.bincount(chosen.flatten(), minlength=num_experts)
    work = torch.cat((torch.full((shared,), len(tokens)), counts)).double()
    torch.testing.assert_close(balanced_load(num_experts, top_k, shared), work / work.sum(), rtol=1e-12, atol=0)


def test_the_printed_load_is_that_of_one_routed_expert_a_token() -> None:
    shared, routed = 3, 13
    printed = torch.tensor([1.0] * shared + [1 / routed] * routed, dtype=torch.float64) / (shared + 1)
    torch.testing.assert_close(balanced_load(routed, 1, shared), printed, rtol=1e-12, atol=0)
    assert balanced_load(routed, 5, shared).sum().item() == pytest.approx(1, rel=1e-12)
    assert balanced_load(routed, 5, shared)[0].item() == pytest.approx(1 / 8, rel=1e-12)


def test_the_output_of_an_expert_has_the_size_that_is_asked_for_at_any_width() -> None:
    for hidden in (50, 400):
        layer = MoEConfig(num_experts=8, top_k=2, hidden=hidden).build(100, out_std=0.02)
        assert layer.w_down.std().item() == pytest.approx(0.02 * (100 / hidden) ** 0.5, rel=0.03)
