"""Experts: the written-out sum, gradients, dispatch that drops nothing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from danlu.nn import LossFreeConfig, MoE, MoEConfig, scaling_factor
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
    ],
)
def test_layer_is_shared_experts_plus_the_gated_sum_over_chosen_ones(changes: dict[str, object]) -> None:
    layer, x = build(**changes), random(13, 11)
    c = layer.config
    logits = x @ layer.router.T
    scores = logits.sigmoid() if c.gate == "sigmoid" else logits.softmax(-1)
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
