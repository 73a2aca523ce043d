"""A training step by the share of tokens left out: DropToken on text; an MAE encoder on visible patches or on all."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import harness
from danlu.models import MAE, MAEConfig, Transformer, TransformerConfig
from danlu.nn import GQAConfig
from danlu.objectives import CausalLM, CausalLMConfig, MaskedImage, kept_tokens

RATES = (0.0, 0.15, 0.25, 0.5)


def step(objective: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    """One forward and backward pass."""
    weights = list(objective.parameters())
    return lambda: torch.autograd.grad(objective(batch), weights)


def text(options: harness.Options) -> harness.Comparison:
    """Two layers of width 256, 2 x 256 tokens, a small head."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=512, dim=256, layers=2, hidden=640, attention=GQAConfig(num_heads=4))
    model = Transformer(config)
    tokens = torch.randint(512, (2, 256))
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1)}
    runs = {str(rate): step(CausalLM(model, CausalLMConfig(drop_tokens=rate)), batch) for rate in RATES}
    return harness.compare("DropToken, share left out", runs, base="0.0", options=options)


def encode(mae: MAE, images: Tensor, visible: Tensor | None) -> Callable[[], object]:
    """Forward and backward pass of the encoder alone."""
    weights = [*mae.first.parameters(), *mae.blocks.parameters()]
    return lambda: torch.autograd.grad(mae.encode(images, visible).sum(), weights)


def images(options: harness.Options) -> harness.Comparison:
    """The encoder of ``digits-mae`` on 16 images of 49 patches: 12 of them, or all."""
    torch.manual_seed(0)
    mae, x = MAE(MAEConfig()), torch.randn(16, 1, 28, 28)
    runs = {"all patches": encode(mae, x, None), "visible patches": encode(mae, x, kept_tokens(16, 49, 0.75))}
    return harness.compare("MAE, encoder", runs, base="all patches", options=options)


class _EncodesAll(MAE):
    """An encoder that works on every place: what it would cost to put mask tokens before it."""

    def encode(self, x_bchw: Tensor, visible_bk: Tensor | None = None) -> Tensor:
        z_btd = super().encode(x_bchw)
        if visible_bk is None:
            return z_btd
        return z_btd.gather(1, visible_bk[..., None].expand(-1, -1, z_btd.shape[-1]))


def steps(options: harness.Options) -> harness.Comparison:
    """The whole training step of ``digits-mae``, decoder included."""
    torch.manual_seed(0)
    config, batch = MAEConfig(), {"images": torch.randn(16, 1, 28, 28)}
    runs = {
        "all patches": step(MaskedImage(_EncodesAll(config)), batch),
        "visible patches": step(MaskedImage(MAE(config)), batch),
    }
    return harness.compare("MAE, training step", runs, base="all patches", options=options)


def main() -> None:
    """Run the comparisons."""
    options = harness.options(__doc__, cpu_time=True, threads=1)
    harness.write("drop_token", __doc__, [text(options), images(options), steps(options)], options)


if __name__ == "__main__":
    main()
