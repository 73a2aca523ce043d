"""Networks of images, 64 x 1 x 28 x 28: a training step and an evaluation, danlu beside diffusers' UNet2DModel.

Parts: ``train`` (forward, backward, fused AdamW), ``sample`` (one evaluation without gradients). 32, 64 and 96
channels for diffusers, with and without attention at 7x7 and with one layer a block and with two.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import harness
from danlu.models import DiT, DiTConfig, UNet, UNetConfig

PARTS = ("train", "sample")
BATCH, SIZE = 64, 28
BASE = "diffusers, no attention"


def diffusers_unet(layers: int, *, attention: bool) -> nn.Module:
    """The peer, conditioned on time alone."""
    from diffusers import UNet2DModel

    lowest = "Attn" if attention else ""
    made: nn.Module = UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=layers,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", f"{lowest}DownBlock2D"),
        up_block_types=(f"{lowest}UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return made


def networks() -> dict[str, nn.Module]:
    """The implementations, all unconditional."""
    return {
        "diffusers, attention": diffusers_unet(1, attention=True),
        BASE: diffusers_unet(1, attention=False),
        "diffusers, two layers": diffusers_unet(2, attention=False),
        "danlu U-Net": UNet(UNetConfig()),
        "danlu U-Net, wider": UNet(UNetConfig(widths=(96, 128))),
        "danlu DiT": DiT(DiTConfig(layers=6)),
    }


def forward(network: nn.Module, x: Tensor, t: Tensor) -> Callable[[], Tensor]:
    """One evaluation."""
    if isinstance(network, (UNet, DiT)):
        return lambda: network(x, t)
    return lambda: network(x, 1000 * t).sample


def step(network: nn.Module, evaluate: Callable[[], Tensor], target: Tensor) -> harness.Run:
    """One optimizer step with the same fused AdamW for everybody."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        (evaluate() - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def without_gradients(evaluate: Callable[[], Tensor]) -> harness.Run:
    """One evaluation as a sampler makes it."""

    def run() -> None:
        with torch.no_grad():
            evaluate()

    return run


def main() -> None:
    """Run the parts asked for."""
    from torch.utils.flop_counter import FlopCounterMode

    options = harness.options(__doc__, parts=PARTS, rounds=5, seconds=0.0)
    torch.manual_seed(0)
    x, t, target = torch.randn(BATCH, 1, SIZE, SIZE), torch.rand(BATCH), torch.randn(BATCH, 1, SIZE, SIZE)
    made = networks()
    evaluations = {name: forward(network, x, t) for name, network in made.items()}
    gflop, notes = {}, {}
    for name, network in made.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            evaluations[name]()
        gflop[name] = counter.get_total_flops() / 1e9
        parameters = sum(p.numel() for p in network.parameters())
        notes[name] = f"{parameters / 1e6:.2f} M parameters, {gflop[name]:.1f} GFLOP forward"
    results: list[harness.Comparison | harness.Sweep] = []
    for part in options.parts:
        if part == "train":
            runs = {name: step(made[name], evaluations[name], target) for name in made}
            work = {name: 3 * count for name, count in gflop.items()}
        else:
            runs = {name: without_gradients(evaluations[name]) for name in made}
            work = dict(gflop)
        title = f"{part}, {BATCH} x 1 x {SIZE} x {SIZE}"
        compared = harness.compare(title, runs, base=BASE, options=options, work=work, unit="GFLOP", notes=notes)
        results.append(compared)
    harness.write("images", __doc__, results, options)


if __name__ == "__main__":
    main()
