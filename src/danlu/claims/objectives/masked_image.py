"""Masked autoencoding: the encoder knows nothing of hidden patches and works on the visible ones alone."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from danlu.claims.frame import Claim, at_most, exact, relative
from danlu.models import MAE, MAEConfig
from danlu.objectives import MaskedImage, MaskedImageConfig, draws, kept_tokens


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


def _counted(visible: int, *, columns: bool = True) -> float:
    """Operations of a block of ViT-L for these of 196 patches, counted as it runs; else its linear maps alone."""
    with torch.device("meta"):
        block = MAE(MAEConfig(dim=1024, num_heads=16, layers=1)).blocks[0]
        x, tables = torch.empty(1, visible, 1024), torch.empty(2, visible, 64)
    if not columns:
        return 2.0 * visible * sum(parameter.numel() for parameter in block.parameters() if parameter.ndim == 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        block(x, (tables[0], tables[1]))
    return float(counter.get_total_flops())


def _loss_error(*, hidden: bool = True) -> float:
    """Relative error of the loss, its gradient and the targets against their formulas; else all patches enter.

    Targets normalised and not, 25 patches of 16 pixels of which 19 are hidden.
    """
    worst = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MAE(
            MAEConfig(image_size=20, dim=16, layers=1, num_heads=2, decoder_dim=8, decoder_num_heads=1)
        ).double()
        torch.nn.init.normal_(model.last.weight)
        images = torch.randn(5, 1, 20, 20, dtype=torch.float64)
        for normalise in (True, False):
            objective = MaskedImage(model, MaskedImageConfig(normalise=normalise))
            keys = torch.arange(5)
            found = objective({"images": images, "position": keys})
            visible = draws.uniform(keys, "kept tokens", 25).topk(6, dim=1, largest=False).indices.sort(1).values
            patches = images.view(5, 5, 4, 5, 4).transpose(2, 3).reshape(5, 25, 16)
            if normalise:
                patches = (patches - patches.mean(-1, keepdim=True)) / patches.std(-1, correction=0, keepdim=True)
            squares = (model(images, visible) - patches).square().mean(-1)
            weight = torch.ones(5, 25).scatter(1, visible, 0.0) if hidden else torch.ones(5, 25)
            wanted = (squares * weight / weight.sum(1, keepdim=True)).sum()
            slopes = (torch.autograd.grad(loss, model.bridge.weight, retain_graph=True)[0] for loss in (found, wanted))
            for a, b in ((found, wanted), tuple(slopes)):
                worst = max(worst, float((a - b).detach().norm() / b.detach().norm()))
    return worst


CLAIMS = (
    Claim(
        name="hidden-is-unread",
        statement="change of the visible patches' features when hidden pixels change; control: the encoder reads all",
        source="He et al., arXiv 2111.06377, section 3",
        expected=0,
        tolerance=exact(),
        measure=lambda: _leak(everything=False),
        control=lambda: _leak(everything=True),
        seconds=0.1,
    ),
    Claim(
        name="loss",
        statement="relative error of the loss of hidden patches and its gradient; control: visible ones enter too",
        source="He et al., arXiv 2111.06377, sections 3 and 4.1 (targets of unit variance)",
        expected=1e-6,
        tolerance=at_most(),
        measure=_loss_error,
        control=lambda: _loss_error(hidden=False),
        seconds=0.1,
    ),
    Claim(
        name="encoder-work",
        statement="times less work counted in a block of ViT-L at mask 0.75; control: its linear maps alone",
        source="He et al., arXiv 2111.06377 (3x or more in time); (24 n d^2 + 4 n^2 d) over the same of n / 4",
        expected=(24 * 196 * 1024 + 4 * 196**2) / (24 * 49 * 1024 + 4 * 49**2),
        tolerance=relative(1e-4),
        measure=lambda: _counted(196) / _counted(49),
        control=lambda: _counted(196, columns=False) / _counted(49, columns=False),
        seconds=0.2,
    ),
)
