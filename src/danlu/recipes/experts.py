"""Three ways of balancing experts, on one model: an auxiliary loss, biases without a loss, a dynamic number of experts.

The model is ``lm`` without its other choices: grouped-query attention as in ``lm-dense``, so that the three differ from
one another in ``model.experts.balance`` alone.
"""

from dataclasses import replace

from danlu.nn import AuxiliaryLossConfig, DynamicConfig, LossFreeConfig, MoEConfig
from danlu.recipes.lm import lm_dense
from danlu.train import RunConfig


def balanced(recipe: str, balance: AuxiliaryLossConfig | LossFreeConfig | DynamicConfig) -> RunConfig:
    """``lm-dense`` with 16 experts, 4 per token, and a shared one."""
    config = lm_dense()
    experts = MoEConfig(num_experts=16, top_k=4, hidden=128, num_shared_experts=1, balance=balance)
    return replace(config, recipe=recipe, model=replace(config.model, experts=experts))


def lm_moe_aux() -> RunConfig:
    """Experts balanced by an auxiliary loss.

    Auxiliary loss by straight-through, at the weight that suits sigmoid gates.
    """
    return balanced("lm-moe-aux", AuxiliaryLossConfig(weight=1e-3))


def lm_moe_lossfree() -> RunConfig:
    """Experts balanced by biases without a loss.

    Selection biases that move with the excess, as fast as Muon moves the router, and come to rest with it.
    """
    return balanced("lm-moe-lossfree", LossFreeConfig(rule="rms", rate=1e-2, scheduled=True))


def lm_moe_dynamic() -> RunConfig:
    """As many experts as a token needs, four on average."""
    return balanced("lm-moe-dynamic", DynamicConfig(rate=1e-3))
