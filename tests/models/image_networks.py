"""The networks of images at sizes for tests, all of which have to pass the same tests."""

from typing import Any

import torch
from torch import nn

from danlu.models import DiT, DiTConfig, UNet, UNetConfig

SIZES: dict[str, dict[str, Any]] = {
    "unet": {"widths": (8, 12), "blocks": (1, 2), "patch": 2, "num_heads": 3, "condition": 10},
    "flat unet": {"widths": (12,), "blocks": (2,), "patch": 1, "num_heads": 0, "condition": 10},
    "dit": {"dim": 24, "layers": 2, "num_heads": 3, "patch": 4},
}


def build(name: str, *, seed: int = 0, **options: Any) -> UNet | DiT:
    """Make a network whose weights, those that begin at zero too, are drawn from N(0, 0.3^2 / fan_in)."""
    torch.manual_seed(seed)
    sizes = {**SIZES[name], "image_size": 12, "channels": 3, **options}
    network = DiT(DiTConfig(**sizes)) if name == "dit" else UNet(UNetConfig(**sizes))
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        nn.init.normal_(parameter, std=fan_in**-0.5 if parameter.dim() > 1 else 0.3)
    return network
