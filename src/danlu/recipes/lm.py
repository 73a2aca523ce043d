"""Language models on text: the default, its dense counterpart, and the baseline both are compared with.

Each is sized for about eight minutes of training on two cores of a processor with bfloat16 instructions; a faster
machine is better served by more ``--train.steps``, one without them by half as many.
"""

from dataclasses import replace

from danlu.data import TextConfig
from danlu.models import GPTConfig, TransformerConfig
from danlu.nn import GQAConfig, MLAConfig, MoEConfig
from danlu.objectives import CausalLMConfig, MaskedLMConfig, PrefixLMConfig
from danlu.optim import AdamWConfig, AmosConfig, Constant, LionConfig, MuonConfig, TigerConfig, WarmupStableDecay
from danlu.train import RunConfig, TrainConfig


def lm() -> RunConfig:
    """Language model: latent attention, shared and fine-grained experts, Muon.

    Multi-head latent attention, fine-grained experts with a shared one, loss-free balancing, Muon.
    """
    return RunConfig(
        recipe="lm",
        data=TextConfig(vocab_size=4096, length=256, batch=16),
        model=TransformerConfig(
            dim=256,
            layers=4,
            hidden=640,
            attention=MLAConfig(num_heads=4, kv_rank=128, nope_dim=48, rope_dim=16, value_dim=64),
            experts=MoEConfig(num_experts=16, top_k=4, hidden=128, num_shared_experts=1),
        ),
        objective=CausalLMConfig(),
        optim=MuonConfig(lr=4e-3, embedding_lr=0.16, no_decay=()),
        schedule=WarmupStableDecay(warmup=10, decay=0.4),
        train=TrainConfig(steps=600, minutes=8, eval_every=150),
    )


def lm_dense() -> RunConfig:
    """Llama's architecture: lm without experts, grouped-query attention, Muon."""
    return RunConfig(
        recipe="lm-dense",
        data=TextConfig(vocab_size=4096, length=256, batch=16),
        model=TransformerConfig(dim=256, layers=4, hidden=640, attention=GQAConfig(num_heads=4)),
        objective=CausalLMConfig(),
        optim=MuonConfig(lr=4e-3, embedding_lr=0.16, no_decay=()),
        schedule=WarmupStableDecay(warmup=10, decay=0.4),
        train=TrainConfig(steps=760, eval_every=190),
    )


def lm_dense_adamw() -> RunConfig:
    """lm-dense trained by AdamW instead.

    The dense model with danlu's initialisation, trained by AdamW: what the architecture alone is worth.
    """
    return replace(
        lm_dense(),
        recipe="lm-dense-adamw",
        data=TextConfig(vocab_size=4096, length=256, batch=8),
        optim=AdamWConfig(lr=3e-3),
        schedule=WarmupStableDecay(warmup=20, decay=0.4),
        train=TrainConfig(steps=1600, eval_every=400),
    )


def lm_dense_mup() -> RunConfig:
    """lm-dense-adamw with learning rates that follow the width.

    The rate was found at width 256: other widths (``--model.dim 512``) need no search of their own.
    """
    config = lm_dense_adamw()
    return replace(config, recipe="lm-dense-mup", optim=AdamWConfig(lr=3e-3, mup_base_width=256))


def lm_dense_lion() -> RunConfig:
    """lm-dense trained by Lion instead.

    The dense model trained by Lion: AdamW's recipe at a third of its rate and three times its decay.
    """
    return replace(lm_dense_adamw(), recipe="lm-dense-lion", optim=LionConfig(lr=1e-3, weight_decay=0.3))


def lm_dense_tiger() -> RunConfig:
    """lm-dense trained by Tiger instead.

    The dense model trained by Tiger, whose steps are relative to the size of what they move.
    """
    return replace(lm_dense_adamw(), recipe="lm-dense-tiger", optim=TigerConfig(lr=1e-2))


def lm_dense_amos() -> RunConfig:
    """lm-dense trained by Amos instead.

    The dense model trained by Amos: no schedule and no decay to choose, half of AdamW's memory.
    """
    return replace(
        lm_dense_adamw(),
        recipe="lm-dense-amos",
        optim=AmosConfig(lr=0.03, embedding_eta=1.0),
        schedule=Constant(warmup=20),
    )


def lm_baseline() -> RunConfig:
    """Dense GPT of the same active size with AdamW, to compare with.

    A plain GPT of the same active size, trained by AdamW.
    """
    return RunConfig(
        recipe="lm-baseline",
        data=TextConfig(vocab_size=4096, length=256, batch=8),
        model=GPTConfig(dim=256, layers=4, num_heads=4),
        objective=CausalLMConfig(),
        optim=AdamWConfig(lr=1e-3),
        schedule=WarmupStableDecay(warmup=20, decay=0.4),
        train=TrainConfig(steps=1600, eval_every=400),
    )


def lm_masked() -> RunConfig:
    """lm-dense as an encoder: hidden tokens from both sides.

    The dense model as an encoder: every token sees every token, a share of them is hidden and asked for.
    """
    config = lm_dense()
    return replace(
        config,
        recipe="lm-masked",
        model=replace(config.model, attention=GQAConfig(num_heads=4, mask="bidirectional")),
        objective=MaskedLMConfig(),
    )


def lm_prefix() -> RunConfig:
    """lm-dense whose rows begin with a prefix that sees itself; the loss is of what follows.

    UniLM beside GPT: ``--model.attention.mask causal`` is the same run without the view ahead.
    """
    config = lm_dense()
    return replace(
        config,
        recipe="lm-prefix",
        model=replace(config.model, attention=GQAConfig(num_heads=4, mask="prefix")),
        objective=PrefixLMConfig(),
    )
