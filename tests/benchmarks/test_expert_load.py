"""The figures that explain a load: their floor, the best biases, and which experts tokens choose."""

import pytest
import torch
from benchmarks import expert_load as load

from danlu.nn import DynamicConfig, LossFreeConfig, MoE, MoEConfig
from danlu.nn.balance import max_violation

every_balance = pytest.mark.parametrize("balance", [LossFreeConfig(), DynamicConfig()])


def test_the_floor_is_the_maximum_of_a_multinomial_draw():
    assert load.noise_floor(64, 6, 4096, draws=40) == pytest.approx(0.123, abs=0.01)  # spec 003, section 7.5


@every_balance
def test_choices_are_the_layers_own(balance):
    torch.manual_seed(0)
    layer = MoE(8, MoEConfig(num_experts=5, top_k=2, hidden=4, balance=balance))
    layer.balancer.bias += 0.1 * torch.randn(5)
    x = torch.randn(50, 8)
    own = layer.route(x)[1]
    own = own.float() if layer.config.balance.thresholds else torch.zeros(50, 5).scatter_(1, own, 1.0)
    scores = torch.nn.functional.linear(x, layer.router).sigmoid()
    assert torch.equal(load.chosen(layer, scores, layer.balancer.bias), own)


@every_balance
def test_fitted_biases_even_the_load_of_all_tokens_together(balance):
    torch.manual_seed(0)
    scores = torch.rand(3, 2000, 6) ** torch.tensor([0.4, 0.7, 1.0, 1.5, 2.0, 3.0])
    layer = MoE(8, MoEConfig(num_experts=6, top_k=2, hidden=4, balance=balance))
    before, after = (
        load.chosen(layer, scores, bias).sum((0, 1)) for bias in (layer.balancer.bias, load.fitted(layer, scores))
    )
    assert max_violation(before) > 0.5
    assert max_violation(after) < 0.01
    assert after.sum() == pytest.approx(2 * 6000, rel=0.01)
