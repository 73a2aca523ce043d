"""A training step of MeanFlow beside one of flow matching: the same U-Net, 32 images of 28 x 28.

Contestants: danlu with a quarter (the default), half and three quarters of the rows with r != t; the derivative of the
whole batch in one pass with the loss, as published implementations compute it; and of the whole batch without gradient
beside a plain forward pass. All give the same gradient for the same share.
"""

import torch
from torch import Tensor

from benchmarks import harness
from danlu.models.unet import UNet, UNetConfig
from danlu.objectives import FlowMatching, MeanFlow, MeanFlowConfig, total_derivative

SHARES = {"a quarter": 0.25, "half": 0.5, "three quarters": 0.75}


def main() -> None:
    options = harness.options(__doc__, rounds=5, warmup=1, threads=1)
    torch.manual_seed(0)
    net = UNet(UNetConfig(two_times=True))
    with torch.no_grad():
        for parameter in net.parameters():  # what starts at zero would save the derivative work
            if not parameter.any():
                parameter.normal_(std=0.02)
    batch = {"images": torch.randn(32, 1, 28, 28)}
    objectives = {name: MeanFlow(net, MeanFlowConfig(share=share)) for name, share in SHARES.items()}
    draw = objectives["a quarter"]._draw(batch, torch.arange(32), (1, 4))

    def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return net(x, t, None, r)

    def step(loss: Tensor) -> None:
        net.zero_grad(set_to_none=True)
        loss.backward()

    def error(value: Tensor, slope: Tensor) -> Tensor:
        return (value + ((draw.t - draw.r).view(-1, 1, 1, 1) * slope).detach() - draw.velocity).square().sum()

    def whole() -> None:
        step(error(*total_derivative(u, draw.x, draw.t, draw.r, draw.velocity)))

    def beside() -> None:
        with torch.no_grad():
            _, slope = total_derivative(u, draw.x, draw.t, draw.r, draw.velocity)
        step(error(u(draw.x, draw.t, draw.r), slope))

    runs: dict[str, harness.Run] = {"flow matching": lambda: step(FlowMatching(net)(batch))}
    for name, objective in objectives.items():
        runs[f"danlu, {name}"] = lambda objective=objective: step(objective(batch))
    runs |= {"whole batch, one pass": whole, "whole batch, without gradient": beside}
    table = harness.compare("step of 32 x 1 x 28 x 28, U-Net of 1.36 M", runs, base="flow matching", options=options)
    harness.write("meanflow", __doc__, [table], options)


if __name__ == "__main__":
    main()
