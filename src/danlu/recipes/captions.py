"""Text with images of digits inside, read and drawn; the recipes differ in where the patches stand."""

from dataclasses import replace

from danlu.data.captions import VOCABULARY, CaptionsConfig
from danlu.models import TextImageConfig
from danlu.nn import GQAConfig
from danlu.objectives import CaptioningConfig
from danlu.optim import MuonConfig, WarmupStableDecay
from danlu.train import RunConfig, TrainConfig


def digits_caption() -> RunConfig:
    """Sentences with images of digits, read and drawn; RoPE-Tie.

    Patches at RoPE-Tie's coordinates.
    """
    data = CaptionsConfig(source="digits8", patch=4, digits=4, batch=32)
    return RunConfig(
        recipe="digits-caption",
        data=data,
        model=TextImageConfig(
            vocab_size=len(VOCABULARY),
            patch_values=data.patch**2,
            dim=96,
            layers=3,
            hidden=256,
            attention=GQAConfig(num_heads=4),
        ),
        objective=CaptioningConfig(),
        optim=MuonConfig(lr=4e-3, embedding_lr=0.04, no_decay=()),
        schedule=WarmupStableDecay(warmup=20, decay=0.4),
        train=TrainConfig(steps=1000, eval_every=250),
    )


def digits_caption_flat() -> RunConfig:
    """digits-caption with patches in one dimension."""
    return _with("digits-caption-flat", "flat")


def digits_caption_unscaled() -> RunConfig:
    """digits-caption with patches a step of one apart.

    Patches in two dimensions a step of one apart, as in Qwen2-VL.
    """
    return _with("digits-caption-unscaled", "unscaled")


def _with(name: str, scheme: str) -> RunConfig:
    config = digits_caption()
    return replace(config, recipe=name, model=replace(config.model, scheme=scheme))
