"""Experts: the written-out sum, gradients, dispatch that drops nothing."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from danlu.nn import AuxiliaryLossConfig, DynamicConfig, LossFreeConfig, MoE, MoEConfig, grouped, scaling_factor
from danlu.nn.grouped import routed_experts


def build(**changes: object) -> MoE:
    torch.manual_seed(5)
    sizes: dict[str, object] = {"experts": 7, "active": 3, "hidden": 5, "shared": 2}
    return MoE(11, MoEConfig(**(sizes | changes))).double()  # type: ignore[arg-type]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def written_out(x: Tensor, gate: Tensor, chosen: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Every token's experts one by one."""
    rows = []
    for n in range(x.shape[0]):
        total = torch.zeros_like(x[n])
        for g, e in zip(gate[n], chosen[n]):
            first, second = (w_up[e] @ x[n]).chunk(2)
            total = total + g * (w_down[e] @ (F.silu(first) * second))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared": 0},
        {"gate": "softmax", "renormalize": False},
        {"active": 1},
        {"active": 7},
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
    values, chosen = scores.topk(c.active, -1)
    gate = values / values.sum(-1, keepdim=True) if c.renormalize else values
    expected = layer.scale * written_out(x, gate, chosen, layer.w_up, layer.w_down)
    if layer.shared is not None:
        expected = expected + layer.shared(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_gradients_equal_those_of_the_written_out_sum() -> None:
    x, w_up, w_down = (
        random(13, 11).requires_grad_(),
        random(7, 10, 11).requires_grad_(),
        random(7, 11, 5).requires_grad_(),
    )
    gate = random(13, 3).requires_grad_()
    chosen = torch.randint(0, 6, (13, 3), generator=torch.Generator().manual_seed(0))  # expert 6 stays idle
    upstream = random(13, 11)
    inputs = (x, gate, w_up, w_down)
    ours = torch.autograd.grad(routed_experts(x, gate, chosen, w_up, w_down), inputs, upstream)
    theirs = torch.autograd.grad(written_out(x, gate, chosen, w_up, w_down), inputs, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert not ours[2][6].any()


def test_bfloat16_grouped_product_equals_the_float32_loop_within_its_rounding() -> None:
    x, w_up, w_down = random(37, 16), random(5, 32, 16) / 4, random(5, 16, 16) / 4
    gate, chosen = random(37, 2).sigmoid(), torch.randint(0, 5, (37, 2))
    leaves = [t.float().requires_grad_() for t in (x, w_up, w_down)]
    exact = routed_experts(leaves[0], gate.float(), chosen, leaves[1], leaves[2])
    low = routed_experts(leaves[0].bfloat16(), gate.float(), chosen, leaves[1], leaves[2])
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() / exact.norm() < 0.02
    ours = torch.autograd.grad(low.float().square().sum(), leaves)
    theirs = torch.autograd.grad(exact.square().sum(), leaves)
    for a, b in zip(ours, theirs):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cutting_the_experts_into_parts_changes_no_number(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [
        t.to(dtype).requires_grad_() for t in (random(40, 16), random(40, 2), random(7, 16, 16), random(7, 16, 8))
    ]
    x, gate, w_up, w_down = inputs
    chosen = torch.randint(0, 6, (40, 2), generator=torch.Generator().manual_seed(0))  # expert 6 stays idle
    found = []
    for part in (1, 30 * 16 * dtype.itemsize, 1 << 30):  # one expert at a time, two or so, all at once
        monkeypatch.setattr(grouped, "_PART", part)
        y = routed_experts(x, gate, chosen, w_up, w_down)
        found.append((y, *torch.autograd.grad(y, inputs, torch.ones_like(y))))
    # Tokens get the sum of their experts in another order when these come in another number of calls.
    tolerance = {} if dtype == torch.bfloat16 else {"rtol": 1e-13, "atol": 1e-13}
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], **tolerance)


def test_of_a_choice_only_gate_and_up_activations_are_kept() -> None:
    x, gate, w_up, w_down = (
        t.requires_grad_() for t in (random(40, 16), random(40, 3), random(7, 20, 16), random(7, 16, 10))
    )
    chosen = torch.randint(0, 7, (40, 3), generator=torch.Generator().manual_seed(0))
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        routed_experts(x, gate, chosen, w_up, w_down)
    inputs = {t.data_ptr() for t in (x, gate, w_up, w_down)}
    new = sum(t.numel() for t in kept if t.data_ptr() not in inputs)
    assert new == 120 * (20 + 3)  # gate and up; the gate, its place and its token


@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_no_token_is_dropped_whatever_the_routing(tokens: int, experts: int, data: st.DataObject) -> None:
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, experts - 1), min_size=tokens, max_size=tokens)))[:, None]
    x = random(tokens, 3)
    w_up, w_down = random(experts, 4, 3), random(experts, 3, 2)
    gate = torch.ones(tokens, 1, dtype=torch.float64)
    ours = routed_experts(x, gate, chosen, w_up, w_down)
    torch.testing.assert_close(ours, written_out(x, gate, chosen, w_up, w_down), rtol=1e-11, atol=1e-11)


def test_equal_experts_make_the_layer_dense() -> None:
    layer, x = build(shared=0, scale=1.0), random(13, 11)
    layer.w_up.data[:] = layer.w_up.data[0]
    layer.w_down.data[:] = layer.w_down.data[0]
    first, second = (x @ layer.w_up[0].T).chunk(2, -1)
    torch.testing.assert_close(layer(x), (F.silu(first) * second) @ layer.w_down[0].T, rtol=1e-12, atol=1e-12)


def test_splitting_experts_keeps_total_and_active_parameters() -> None:
    def stack(experts: int, active: int, hidden: int) -> tuple[int, int]:
        layer = MoE(12, MoEConfig(experts=experts, active=active, hidden=hidden, shared=0))
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
        ({"active": 8}, "active must be an integer from 1 to 7"),
        ({"experts": 0}, "experts"),
        ({"hidden": 0}, "hidden"),
        ({"shared": -1}, "shared"),
        ({"scale": 0.0}, "scale"),
        ({"gate": "sigmod"}, "did you mean 'sigmoid'"),
        ({"groups": 3}, "groups must divide"),
        ({"groups": 7, "active_groups": 2}, "active must be at most 2"),
        ({"select_by": "softmax"}, "select_by"),
        ({"balance": AuxiliaryLossConfig(target=(1.0, 2.0))}, "target must name a load for each of 7"),
        ({"balance": DynamicConfig(), "gate": "softmax"}, "dynamic number of experts needs gate"),
        ({"balance": DynamicConfig(), "active": 7}, "active must be below"),
    ],
)
def test_impossible_fields_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize(("changes", "message"), [({"rate": -1.0}, "rate"), ({"rule": "sing"}, "did you mean 'sign'")])
def test_impossible_balancing_is_refused_by_name(changes: dict[str, object], message: str) -> None:
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


def test_block_of_a_network_is_the_sum_of_its_experts() -> None:
    """The geometric view: f(xA)B = sum of f(x A_i) B_i over blocks, and all of k = n is the dense network."""
    x, w_up, w_down = random(13, 11), random(7, 10, 11), random(7, 11, 5)
    everyone = torch.arange(7).expand(13, 7)
    y = routed_experts(x, torch.ones(13, 7, dtype=torch.float64), everyone, w_up, w_down)
    first, second = w_up[:, :5].reshape(35, 11), w_up[:, 5:].reshape(35, 11)
    dense = (F.silu(x @ first.T) * (x @ second.T)) @ w_down.transpose(0, 1).reshape(11, 35).T
    torch.testing.assert_close(y, dense, rtol=1e-11, atol=1e-12)


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
    layer, x = build(normalize_experts=True, renormalize=False, gate="relu", shared=0, scale=1.0), random(13, 11)
    y = layer(x)
    layer.w_down.data[3] *= 100.0
    torch.testing.assert_close(layer(x), y, rtol=1e-8, atol=1e-8)  # the eps of the norm is 1e-12 of a mean square
    plain = build(shared=0)
    before = plain(x)
    plain.w_down.data[3] *= 100.0
    assert (plain(x) - before).abs().max() > 1


def test_normalised_experts_equal_the_written_out_sum_and_its_gradient() -> None:
    x, w_up, w_down = random(13, 11).requires_grad_(), random(7, 10, 11), random(7, 11, 5).requires_grad_()
    gate = random(13, 3).sigmoid().requires_grad_()
    chosen = random(13, 7).topk(3).indices

    def written(x: Tensor, gate: Tensor, w_down: Tensor) -> Tensor:
        rows = []
        for n in range(13):
            total = torch.zeros_like(x[n])
            for g, e in zip(gate[n], chosen[n]):
                first, second = (w_up[e] @ x[n]).chunk(2)
                v = w_down[e] @ (F.silu(first) * second)
                total = total + g * 0.5 * v / v.square().mean().sqrt()
            rows.append(total)
        return torch.stack(rows)

    ours = routed_experts(x, gate, chosen, w_up, w_down, rms=0.5)
    expected = written(x, gate, w_down)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    upstream = random(13, 11)
    found = torch.autograd.grad(ours, (x, gate, w_down), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, gate, w_down), upstream), rtol=1e-8, atol=1e-8)


def test_a_mask_chooses_any_number_of_experts_a_token_and_none() -> None:
    x, gate = random(13, 11).requires_grad_(), random(13, 7).requires_grad_()
    w_up, w_down = random(7, 10, 11), random(7, 11, 5)
    mask = random(13, 7) > 0.3
    mask[4] = False
    mask[:, 6] = False
    ours = routed_experts(x, gate, mask, w_up, w_down)
    assert not ours[4].any()
    expected = written_out(x, gate * mask, torch.arange(7).expand(13, 7), w_up, w_down)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    upstream = random(13, 11)
    ours_grad = torch.autograd.grad(ours, (x, gate), upstream)
    torch.testing.assert_close(ours_grad, torch.autograd.grad(expected, (x, gate), upstream), rtol=1e-11, atol=1e-11)


def test_group_limited_choice_stays_within_the_best_groups_even_with_negative_scores() -> None:
    layer, x = build(experts=12, active=4, groups=4, active_groups=2, shared=0), random(50, 11)
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
    ours = MoE(24, MoEConfig(experts=16, active=5, hidden=10, shared=2, groups=4, active_groups=2, scale=2.5)).double()
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
        MoEConfig(experts=11, active=3, hidden=10, shared=0, gate="softmax", scale=1.0, balance=AuxiliaryLossConfig()),
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
