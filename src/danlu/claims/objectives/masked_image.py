"""Masked autoencoding: the encoder knows nothing of hidden patches and works on the visible ones alone."""

import torch

from danlu.claims.frame import Claim, at_least, exact
from danlu.models import MAE, MAEConfig
from danlu.objectives import kept_tokens


def _leak(*, everything: bool) -> float:
    """Largest change of the visible patches' features when the hidden pixels change."""
    torch.manual_seed(0)
    mae = MAE(MAEConfig(image_size=20, dim=16, layers=2, num_heads=2, decoder_dim=8, decoder_num_heads=1))
    visible = kept_tokens(3, 25, 0.75, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 1, 20, 20)
    other = torch.randn(3, 25, 16).scatter(1, visible[..., None].expand(-1, -1, 16), 0.0)
    pixels = other.view(3, 5, 5, 4, 4).transpose(2, 3).reshape(3, 1, 20, 20)
    with torch.no_grad():
        if everything:
            rows = visible[..., None].expand(-1, -1, 16)
            return float((mae.encode(x) - mae.encode(x + pixels)).gather(1, rows).abs().max())
        return float((mae.encode(x, visible) - mae.encode(x + pixels, visible)).abs().max())


def _saving(visible: int) -> float:
    """How many times less work the encoder of ViT-L has with these of 196 patches."""
    with torch.device("meta"):
        encoder = MAE(MAEConfig(dim=1024, num_heads=16, layers=1))
    return encoder.encoder_flops(196) / encoder.encoder_flops(visible)


CLAIMS = (
    Claim(
        name="hidden-is-unread",
        statement="change of the visible patches' features when hidden pixels change; control: the encoder reads all",
        source="He et al., arXiv 2111.06377, section 3",
        expected=0,
        tolerance=exact(),
        measure=lambda: _leak(everything=False),
        control=lambda: _leak(everything=True),
        seconds=0.2,
    ),
    Claim(
        name="encoder-work",
        statement="times less work for the encoder of ViT-L at mask 0.75; control: mask tokens in the encoder",
        source="He et al., arXiv 2111.06377, abstract: training accelerated by 3x or more",
        expected=3.0,
        tolerance=at_least(),
        measure=lambda: _saving(49),
        control=lambda: _saving(196),
        seconds=0.1,
    ),
)
