"""Language models with state spaces: in every block, and three to one beside attention.

Each differs from `danlu.recipes.lm.lm_dense` in what mixes the tokens and in that gains (a state space's step sizes and
eigenvalues among them) do not decay.
"""

from dataclasses import replace

from danlu.data import TextConfig
from danlu.models import TransformerConfig
from danlu.nn import GQAConfig, SSMConfig
from danlu.nn.ssm import S4DConfig
from danlu.objectives import CausalLMConfig
from danlu.optim import MuonConfig, WarmupStableDecay
from danlu.train import RunConfig, TrainConfig


def lm_ssm() -> RunConfig:
    """lm-dense with state spaces in attention's place."""
    return RunConfig(
        recipe="lm-ssm",
        data=TextConfig(vocab_size=4096, length=256, batch=16),
        model=TransformerConfig(
            dim=256, layers=4, hidden=640, attention=SSMConfig(kernel=S4DConfig(state=32), channels=320)
        ),
        objective=CausalLMConfig(),
        optim=MuonConfig(lr=4e-3, embedding_lr=0.16, no_decay=("gain", "bias")),
        schedule=WarmupStableDecay(warmup=10, decay=0.4),
        train=TrainConfig(steps=380, eval_every=95),
    )


def lm_hybrid() -> RunConfig:
    """lm-dense with state spaces in three of four blocks."""
    space = SSMConfig(kernel=S4DConfig(state=32), channels=320)
    model = TransformerConfig(
        dim=256, layers=4, hidden=640, attention=GQAConfig(num_heads=4), mixers=(space, space, None, space)
    )
    return replace(lm_ssm(), recipe="lm-hybrid", model=model)
