"""Generators of images, and the classifier whose features measure them.

The digits' recipes are sized for about ten minutes on two cores; all of them share one network, so that they can be
compared by what they minimise.
"""

from dataclasses import replace

from danlu.config import Pretrained
from danlu.data import ImagesConfig
from danlu.diffusion import EDM, Betas, Cosine, LogNormalNoise, Shifted, UniformTimes
from danlu.models import ConvNetConfig, MAEConfig, UNetConfig
from danlu.objectives import (
    ClassificationConfig,
    DenoisingConfig,
    FlowMatchingConfig,
    MaskedImageConfig,
    MeanFlowConfig,
    SiDConfig,
)
from danlu.optim import AdamWConfig, WarmupStableDecay
from danlu.train import RunConfig, TrainConfig


def digits() -> RunConfig:
    """Images of digits in one step: MeanFlow, a lean U-Net."""
    return RunConfig(
        recipe="digits",
        data=ImagesConfig(source="digits28", batch=32),
        model=UNetConfig(num_classes=10, two_times=True),
        objective=MeanFlowConfig(prediction="x0", share=0.75, flow_share=0.7, power=0.75, times=UniformTimes()),
        optim=AdamWConfig(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0),
        schedule=WarmupStableDecay(warmup=100, decay=0.5),
        train=TrainConfig(steps=4000, eval_every=1000, ema=0.999),
    )


def digits_flow() -> RunConfig:
    """The network of digits by flow matching, many steps."""
    recipe = digits()
    return replace(
        recipe,
        recipe="digits-flow",
        model=replace(recipe.model, two_times=False),
        objective=FlowMatchingConfig(),
        optim=replace(recipe.optim, lr=1e-3),
        train=replace(recipe.train, steps=6000),
    )


def digits_ddpm() -> RunConfig:
    """The network of digits by denoising: linear betas, ancestral sampling.

    Denoising diffusion as it began: linear betas, predicted noise, ancestral sampling.
    """
    objective = DenoisingConfig(schedule=Betas(), prediction="eps", sampler="ddpm")
    return replace(digits_flow(), recipe="digits-ddpm", objective=objective)


_EDM = DenoisingConfig(
    schedule=EDM(), prediction="edm", times=LogNormalNoise(), sampler="heun", clip=False, label_dropout=0.0
)


def digits_edm() -> RunConfig:
    """The network of digits by denoising in EDM's form, Heun's method."""
    return replace(digits_flow(), recipe="digits-edm", objective=_EDM)


def digits_sid() -> RunConfig:
    """A digits-edm run distilled to one step by SiD.

    A ``digits-edm`` run distilled to one step; name its folder by ``--objective.teacher.run``.
    """
    teacher = digits_edm()
    return replace(
        teacher,
        recipe="digits-sid",
        objective=SiDConfig(teacher=Pretrained(run="runs/digits-edm-1"), denoising=_EDM),
        optim=AdamWConfig(lr=3e-4, betas=(0.0, 0.999), weight_decay=0.0),
        train=replace(teacher.train, steps=1400, clip=None),
    )


def digits_64() -> RunConfig:
    """Digits at 64x64, the schedule shifted to the resolution.

    Digits at 64x64, with the noise of the 28x28 schedule scaled to the resolution.
    """
    recipe = digits_flow()
    return replace(
        recipe,
        recipe="digits-64",
        data=replace(recipe.data, size=64),
        # Down to 16x16 pixels right after the first layer, and the depth at 8x8: simple diffusion, section 3.3.
        model=replace(recipe.model, patch=4),
        objective=DenoisingConfig(schedule=Shifted(base=Cosine(limit=15.0), factor=64 / 28)),
        train=replace(recipe.train, steps=4000),
    )


def images() -> RunConfig:
    """MeanFlow on your own images at 32x32 (--data FOLDER)."""
    recipe = digits()
    return replace(
        recipe,
        recipe="images",
        data=ImagesConfig(size=32, batch=32),
        model=UNetConfig(num_classes=10, two_times=True, widths=(64, 128), blocks=(2, 3)),
    )


def digits_classifier() -> RunConfig:
    """The classifier whose features measure generated digits."""
    return RunConfig(
        recipe="digits-classifier",
        data=ImagesConfig(source="digits28", batch=64),
        model=ConvNetConfig(),
        objective=ClassificationConfig(smoothing=0.1),
        optim=AdamWConfig(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.1),
        schedule=WarmupStableDecay(warmup=50, decay=0.5),
        train=TrainConfig(steps=800, eval_every=None, eval_batches=None, checkpoint_every=None, tensorboard=False),
    )


def digits_mae() -> RunConfig:
    """A masked autoencoder of digits: features without labels."""
    return RunConfig(
        recipe="digits-mae",
        data=ImagesConfig(source="digits28", batch=128),
        model=MAEConfig(patch=4, dim=128, layers=4, num_heads=4, decoder_dim=64, decoder_layers=1, decoder_num_heads=2),
        objective=MaskedImageConfig(mask=0.75),
        optim=AdamWConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05),
        schedule=WarmupStableDecay(warmup=100, decay=0.5),
        # Twelve tokens of 128 numbers: bfloat16 was measured to be slower.
        train=TrainConfig(steps=2000, eval_every=500, precision="float32"),
    )
