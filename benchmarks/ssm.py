"""State-space layers forward and backward, batch 8, 64 channels, 64 states: danlu beside the published formulas.

Parts: ``1024`` and ``4096`` (that length), ``growth`` (danlu's two convolutions over the length), ``prompt`` (a state
that reads 1024 tokens before it decodes: token by token, and in blocks whose matrices are formed anew each time; the
note is the difference of the two). Every implementation of the first three maps
8 x 64 x L float32 numbers to as many and takes the gradients of its parameters and input; the FFT convolution is part
of it. ``S4D formula`` is the exponentials of a channels x 32 x L Vandermonde matrix, ``DPLR formula`` the Cauchy
matrices of channels x 32 x (L/2 + 1), both in complex arithmetic as published, written anew here. The note of a kernel
is its largest difference from the same kernel in float64, relative to the largest entry.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import harness
from danlu.nn.ssm import RTF, S4, S4D, causal_convolution, generating_function
from danlu.nn.ssm.blocks import advance

PARTS = ("1024", "4096", "growth", "prompt")
BATCH, CHANNELS = 8, 64
PROMPT = 1024


def convolved(u_bht: Tensor, k_ht: Tensor) -> Tensor:
    """The published layers' convolution."""
    time = u_bht.shape[-1]
    spectrum = torch.fft.rfft(u_bht, n=2 * time) * torch.fft.rfft(k_ht, n=2 * time)
    return torch.fft.irfft(spectrum, n=2 * time)[..., :time]


def vandermonde_kernel(layer: S4D, length: int) -> Tensor:
    """S4D as published: every power of every eigenvalue is an exponential."""
    a = torch.complex(-layer.log_decay.exp(), layer.frequency)
    dta = a * layer.log_dt.exp()[:, None]
    c = torch.view_as_complex(layer.c) * (torch.exp(dta) - 1) / a
    powers = torch.exp(dta[..., None] * torch.arange(length, dtype=layer.c.dtype))
    return 2 * torch.einsum("hn,hnl->hl", c, powers).real


def cauchy_kernel(layer: S4, length: int) -> Tensor:
    """S4 as published: Cauchy matrices at the roots of unity, conjugates by their own quotients."""
    eigenvalues, p, b, c, step = layer.continuous()
    count = length // 2 + 1
    angles = -2 * math.pi * torch.arange(count, dtype=step.dtype) / length
    nodes = torch.polar(torch.ones_like(angles), angles)
    z = 2 * (1 - nodes) / (1 + nodes)
    scaled = eigenvalues * step[:, None]
    weights = torch.stack((b * c, p * c, b * p.conj(), p * p.conj())) * step[:, None]
    pole, mirror = z - scaled[..., None], z - scaled.conj()[..., None]
    cb, cp, pb, pp = (w[..., None] / pole + w.conj()[..., None] / mirror for w in weights)
    cb, cp, pb, pp = (part.sum(1) for part in (cb, cp, pb, pp))
    return torch.fft.irfft((cb - cp * pb / (1 + pp)) * 2 / (1 + nodes), n=length)


def layer_step(
    layer: nn.Module, kernel: Callable[[], Tensor], mix: Callable[[Tensor, Tensor], Tensor], length: int
) -> harness.Run:
    """Forward and backward of one layer."""
    u = torch.randn(BATCH, CHANNELS, length, requires_grad=True)
    inputs = [u, *layer.parameters()]
    seed = torch.randn(BATCH, CHANNELS, length)

    def run() -> None:
        torch.autograd.grad(mix(u, kernel()), inputs, seed, allow_unused=True)

    return run


def recurrent_step(length: int) -> harness.Run:
    """Forward and backward of torch's GRU of 64 units."""
    layer = nn.GRU(CHANNELS, CHANNELS, batch_first=True)
    x = torch.randn(BATCH, length, CHANNELS, requires_grad=True)
    inputs, seed = [x, *layer.parameters()], torch.randn(BATCH, length, CHANNELS)

    def run() -> None:
        torch.autograd.grad(layer(x)[0], inputs, seed)

    return run


def implementations(length: int, names: tuple[str, ...] | None = None) -> tuple[dict[str, harness.Run], dict[str, str]]:
    """All layers at one length, with the same weights for each kind, and the kernels' errors."""
    torch.manual_seed(0)
    s4d, s4 = S4D(CHANNELS), S4(CHANNELS)
    kernels: dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]] = {
        "S4D formula": (s4d, lambda layer: vandermonde_kernel(layer, length)),
        "danlu S4D": (s4d, lambda layer: layer.kernel(length)),
        "DPLR formula": (s4, lambda layer: cauchy_kernel(layer, length)),
        "danlu DPLR, generating function": (s4, lambda layer: generating_function(*layer.continuous(), length)),
        "danlu DPLR": (s4, lambda layer: layer.kernel(length)),
    }
    runs: dict[str, harness.Run] = {}
    notes = {}
    for name, (layer, kernel) in kernels.items():
        if names is not None and name not in names:
            continue
        mix = causal_convolution if name.startswith("danlu") else convolved
        runs[name] = layer_step(layer, lambda layer=layer, kernel=kernel: kernel(layer), mix, length)
        with torch.no_grad():
            low = kernel(layer).double()
            exact = kernel(layer.double())
            layer.float()
        notes[name] = f"error {float((low - exact).abs().max() / exact.abs().max()):.1e}"
    if names is None or "nn.GRU(64)" in names:
        runs["nn.GRU(64)"] = recurrent_step(length)
    return runs, notes


def prompt_runs(space: S4D | S4 | RTF) -> tuple[dict[str, harness.Run], dict[str, str]]:
    """A state of `lm-ssm`, 256 channels, reading a prompt both ways."""
    system = space.system()
    u, zero = torch.randn(1, PROMPT, 256), space.new_state(1, dtype=torch.float32, device=torch.device("cpu"))

    def stepped() -> Tensor:
        state, outputs = zero, []
        for u_bh in u.unbind(1):
            state, y_bh = space.step(system, state, u_bh)
            outputs.append(y_bh)
        return torch.stack(outputs, 1)

    def blocks() -> Tensor:
        return advance(space.blocks(system, 32), zero, u)[1]

    error = (stepped() - blocks()).abs().max() / stepped().abs().max()
    return {"stepped": stepped, "blocks": blocks}, {"blocks": f"difference {float(error):.1e}"}


def main() -> None:
    options = harness.options(__doc__, parts=PARTS, warmup=1)
    items: list[harness.Comparison | harness.Sweep] = []
    for part in ("1024", "4096"):
        if part in options.parts:
            runs, notes = implementations(int(part))
            items.append(harness.compare(f"length {part}", runs, base="S4D formula", options=options, notes=notes))
    if "growth" in options.parts:
        names = ("danlu S4D", "danlu DPLR")
        sizes = [256, 512, 1024] if options.quick else [1024, 2048, 4096, 8192, 16384]
        items.append(
            harness.sweep(
                "convolution mode",
                sizes,
                lambda size: implementations(size, names)[0],
                options=options,
                axis="length",
            )
        )
    if "prompt" in options.parts:
        torch.manual_seed(0)
        for space in (S4D(256), S4(256), RTF(256)):
            runs, notes = prompt_runs(space.requires_grad_(False))
            title = f"{type(space).__name__}, prompt of {PROMPT}"
            items.append(harness.compare(title, runs, base="stepped", options=options, notes=notes))
    harness.write("ssm", __doc__, items, options)


if __name__ == "__main__":
    main()
