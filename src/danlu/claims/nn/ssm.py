"""State spaces: what their memories recall, and that a kernel and its recurrence are one system."""

import math
from functools import partial

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_most, exact, relative
from danlu.nn import GQA, SSM, GQAConfig, SSMConfig
from danlu.nn.ssm import (
    RTF,
    RTFConfig,
    S4Config,
    S4DConfig,
    discretize,
    generating_function,
    history_step,
    legs,
    legs_dplr,
    legs_eigenvector_sums,
    legs_solve,
    reconstruct,
)
from danlu.nn.ssm.s4 import real_form
from danlu.protocols import Context


def _rmse(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt())


def _recall(method: str) -> float:
    """Error of 32 coefficients of the whole history over 1000 samples."""
    t = torch.arange(1000, dtype=torch.float64) / 1000
    song = (4 * math.pi * t).sin() + 0.5 * (10 * math.pi * t + 1).cos() + 0.3 * t
    return _rmse(reconstruct(song, 32, method=method), song)  # type: ignore[arg-type]


def _window(*, midpoint: bool) -> float:
    """Error of 32 harmonics of the last 1000 of 4000 samples."""
    t = torch.arange(4000, dtype=torch.float64) / 1000
    waves = (2.6 * math.pi * t).sin() + 0.4 * (4.2 * math.pi * t).cos()
    found = reconstruct(waves, 32, memory="fourier-window", window=1000, midpoint=midpoint)
    return _rmse(found, waves[-1000:])


def _counted(method: str) -> float:
    """First coefficient after the samples 1, 2, 3, 4."""
    A, B = legs(3)
    x = torch.tensor([math.sqrt(2), 0, 0], dtype=torch.float64)
    for k in (1, 2, 3):
        a, b = history_step(A, B, k, method=method)  # type: ignore[arg-type]
        x = a @ x + b * (k + 1)
    return float(x[0])


def _kernel_error(*, truncated: bool) -> float:
    """Generating function against powers of the dense matrix, LegS of 64, length 1000, relative."""
    eigenvalues, p, b = legs_dplr(64)
    a, bbar = discretize(real_form(eigenvalues, p), torch.cat((b.real, b.imag)), 0.01, method="bilinear")
    output = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state, values = bbar, []
    for _ in range(1000):
        values.append(output @ state)
        state = a @ state
    expected = torch.stack(values)
    if truncated:
        output = output - output @ torch.linalg.matrix_power(a, 1000)
    c = torch.complex(output[:32], -output[32:]) / 2
    step = torch.tensor([0.01], dtype=torch.float64)
    found = generating_function(eigenvalues[None], p[None], b[None], c[None], step, 1000)[0]
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def _second_response(*, solved: bool) -> float:
    """Second entry of the kernel of a = (.5, -.25), b = (1, 2), length 8, from its recurrence."""
    layer = RTF(1, RTFConfig(state=2, length=8)).double()
    layer.a.copy_(torch.tensor([0.5, -0.25]))
    layer.b.copy_(torch.tensor([1.0, 2.0]))
    a, c = layer.system()
    constants = (a, c if solved else layer.b)
    state = layer.new_state(1, dtype=torch.float64, device=layer.a.device)
    y = torch.zeros(1, 1)
    for u in (1.0, 0.0):
        state, y = layer.step(constants, state, torch.full((1, 1), u, dtype=torch.float64))
    return float(y)


@torch.no_grad()
def _decoding_error(kernel: S4DConfig | S4Config | RTFConfig, *, late: bool) -> float:
    """Relative difference of decoding from the convolution; ``late`` gives an output before its input is read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = SSM(29, SSMConfig(kernel=kernel, channels=31)).double()
        x = torch.randn(2, 37, 29, dtype=torch.float64)
    full = layer(x)
    cache = layer.new_cache(2, 37, dtype=torch.float64, device=x.device)
    steps = torch.cat([layer(token, Context(cache=cache)) for token in x.split(1, 1)], 1)
    if late:
        steps, full = steps[:, :-1], full[:, 1:]
    return float((steps - full).abs().max() / full.abs().max())


def _asymptote(*, printed: bool) -> float:
    """Size of an eigenvector's sum at a third of the order 48 over its asymptote."""
    d = 48
    size = abs(float(legs_eigenvector_sums(d, d // 3)[d // 3]))
    factor = math.sqrt(d) if printed else 4 / 3 * math.sqrt(2 * math.pi / 3) * d**1.5
    return size / (factor * 2 ** (-4 * d / 3))


def _solve_error(*, wrong_step: bool) -> float:
    """The O(d) solve against the dense one at order 256, relative."""
    A, _ = legs(256)
    v = torch.randn(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = torch.linalg.solve(torch.eye(256, dtype=torch.float64) - 0.5 * A, v)
    found = legs_solve(v, 0.25 if wrong_step else 0.5)
    return float((found - dense).norm() / dense.norm())


def _remembered(*, attention: bool) -> int:
    """Numbers that a layer of width 64 keeps for one sequence of 1000 tokens."""
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    if attention:
        layer = GQA(64, GQAConfig(num_heads=4))
        return 1000 * layer.new_cache(1, 1000, **options).elements_per_token()  # type: ignore[arg-type]
    return SSM(64).new_cache(1, 1000, **options).elements()  # type: ignore[arg-type]


CLAIMS = (
    Claim(
        name="history-recall",
        statement="error of 32 LegS coefficients over 1000 samples, exact steps; control: 1/k for ln((k+1)/k)",
        source="kexue.fm 10137; derivation: the best polynomial of that degree",
        expected=1.53e-5,
        tolerance=relative(0.02),
        measure=lambda: _recall("exact"),
        control=lambda: _recall("bilinear-post"),
        seconds=1.0,
    ),
    Claim(
        name="count-to-four",
        statement="first LegS coefficient of 1, 2, 3, 4: sqrt(2) times the mean; control: 1/k for ln((k+1)/k)",
        source="derivation: the projection on a constant",
        expected=2.5 * math.sqrt(2),
        tolerance=absolute(1e-12),
        measure=lambda: _counted("exact"),
        control=lambda: _counted("bilinear-post"),
        seconds=0.1,
    ),
    Claim(
        name="fourier-window",
        statement="error of 32 harmonics of a window, its jump corrected; control: the system as printed",
        source="kexue.fm 10114 with the value at the jump doubled; error measured for the derivation",
        expected=0.055,
        tolerance=relative(0.02),
        measure=lambda: _window(midpoint=False),
        control=lambda: _window(midpoint=True),
        seconds=1.5,
    ),
    Claim(
        name="generating-function",
        statement="relative error of S4's kernel, 64 states, length 1000; control: C in place of C (I - A^L)",
        source="Gu et al., arXiv 2111.00396, Algorithm 1",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _kernel_error(truncated=True),
        control=lambda: _kernel_error(truncated=False),
        seconds=0.3,
    ),
    Claim(
        name="companion-output",
        statement="second kernel entry of a = (.5, -.25), b = (1, 2), L = 8 by its recurrence; control: b as output",
        source="kexue.fm 10180; derivation: C = b (I - A^L)^-1",
        expected=1.693748247827,
        tolerance=absolute(1e-11),
        measure=lambda: _second_response(solved=True),
        control=lambda: _second_response(solved=False),
        seconds=0.1,
    ),
    *(
        Claim(
            name=f"decoding-{name}",
            statement=f"relative error of decoding from the state, {name}, float64; control: outputs one token late",
            source="derivation: y_L = sum_k K_k u_{L-1-k}",
            expected=1e-12,
            tolerance=at_most(),
            measure=partial(_decoding_error, kernel, late=False),
            control=partial(_decoding_error, kernel, late=True),
            seconds=0.3,
        )
        for name, kernel in (
            ("s4d", S4DConfig(state=10)),
            ("s4", S4Config(state=10)),
            ("rtf", RTFConfig(state=10, length=37)),
        )
    ),
    Claim(
        name="eigenvectors",
        statement="eigenvector sum of LegS at d = 48 over (4/3) sqrt(2 pi/3) d^1.5 2^(-4d/3); control: sqrt(d)",
        source="kexue.fm 10162, corrected",
        expected=1,
        tolerance=relative(0.01),
        measure=lambda: _asymptote(printed=False),
        control=lambda: _asymptote(printed=True),
        seconds=0.1,
    ),
    Claim(
        name="linear-solve",
        statement="relative error of the O(d) solve with LegS at order 256; control: half the step",
        source="Gu et al., arXiv 2008.07669, appendix E; derivation",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _solve_error(wrong_step=False),
        control=lambda: _solve_error(wrong_step=True),
        seconds=0.1,
    ),
    Claim(
        name="constant-state",
        statement="numbers kept for 1000 tokens by 64 channels of 64 states; control: multi-head attention",
        source="derivation: channels times states",
        expected=64 * 64,
        tolerance=exact(),
        measure=lambda: _remembered(attention=False),
        control=lambda: _remembered(attention=True),
        seconds=0.1,
    ),
)
