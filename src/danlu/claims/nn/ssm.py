"""State spaces: what their memories recall, and that a kernel and its recurrence are one system."""

import math
from functools import partial

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_most, exact, relative
from danlu.nn import GQA, SSM, GQAConfig, SSMConfig
from danlu.nn.ssm import (
    RTF,
    S4,
    S4D,
    RTFConfig,
    S4Config,
    S4DConfig,
    discretize,
    generating_function,
    history_step,
    legs,
    legs_dplr,
    legs_eigenvector_sums,
    legs_product,
    legs_solve,
    reconstruct,
)
from danlu.nn.ssm.reconstruction import Memory
from danlu.nn.ssm.rtf import rational_kernel, transfer_function
from danlu.nn.ssm.s4 import krylov_kernel, real_form
from danlu.protocols import Context


def _rmse(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt())


def _recall(method: str, order: int = 32, memory: Memory = "legs") -> float:
    """Error of the coefficients of the whole history over 1000 samples."""
    t = torch.arange(1000, dtype=torch.float64) / 1000
    song = (4 * math.pi * t).sin() + 0.5 * (10 * math.pi * t + 1).cos() + 0.3 * t
    return _rmse(reconstruct(song, order, method=method, memory=memory), song)  # type: ignore[arg-type]


def _window(*, midpoint: bool = False, order: int = 32, memory: Memory = "fourier-window") -> float:
    """Error of a memory of the last 1000 of 4000 samples."""
    t = torch.arange(4000, dtype=torch.float64) / 1000
    waves = (2.6 * math.pi * t).sin() + 0.4 * (4.2 * math.pi * t).cos()
    found = reconstruct(waves, order, memory=memory, window=1000, midpoint=midpoint)
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


# Root mean squares that the spectra of two signals leave, measured for the derivation, by memory and order.
_RECALLED: tuple[tuple[Memory, str, int, float], ...] = (
    ("legs", "exact", 8, 0.3195),
    ("legs", "exact", 16, 0.0913),
    ("legs", "bilinear", 32, 0.00055),
    ("fourier-history", "exact", 8, 0.132),
    ("legt", "exact", 8, 0.0661),
    ("legt", "exact", 16, 3.6e-6),
    ("fourier-window", "exact", 8, 0.118),
)


def _table_error(*, logarithm: bool) -> float:
    """Largest relative distance of what memories recall from the table; the control takes 1/k for ln((k+1)/k)."""
    worst = 0.0
    for memory, method, order, expected in _RECALLED:
        moving = memory in ("legt", "fourier-window")
        chosen = method if logarithm or method == "exact" else "bilinear-post"
        found = _window(order=order, memory=memory) if moving else _recall(chosen, order, memory)
        worst = max(worst, abs(found / expected - 1))
    return worst


_RESPONSE = (
    0.760751331651, 1.693748247827, -0.656686291001, 0.751780207457,
    -0.540061676479, 0.457975890104, -0.364003364172, 0.296495654612,
)  # fmt: skip


@torch.no_grad()
def _response_error(*, solved: bool) -> float:
    """Largest error of the kernel of a = (.5, -.25), b = (1, 2), length 8, and of its recurrence."""
    layer = RTF(1, RTFConfig(state=2, length=8)).double()
    layer.a.copy_(torch.tensor([0.5, -0.25]))
    layer.b.copy_(torch.tensor([1.0, 2.0]))
    a, c = layer.system()
    constants = (a, c if solved else layer.b)
    state = layer.new_state(1, dtype=torch.float64, device=layer.a.device)
    outputs = []
    for k in range(8):
        state, y = layer.step(constants, state, torch.full((1, 1), float(k == 0), dtype=torch.float64))
        outputs.append(y[0])
    expected = torch.tensor(_RESPONSE, dtype=torch.float64)
    return max(float((found.flatten() - expected).abs().max()) for found in (torch.cat(outputs), layer.kernel(8)))


def _vector_error(method: str) -> float:
    """Largest error of the first eight numbers of S4's kernel for C = (1, 1, 1, 1), step 0.1."""
    a, b = discretize(*legs(4), 0.1, method=method)  # type: ignore[arg-type]
    found = krylov_kernel(a[None], b[None], torch.ones(1, 4, dtype=torch.float64), 8)[0]
    expected = (
        0.773648637368, 0.315990983925, 0.090501082445, -0.006504560180,
        -0.036234343847, -0.033840943608, -0.018741547149, -0.001041933029,
    )  # fmt: skip
    return float((found - torch.tensor(expected, dtype=torch.float64)).abs().max())


def _transfer_error(*, wrapped: bool) -> float:
    """Relative error of a system's kernel by its transfer function; the control forgets that it is cut at L."""
    A, B = discretize(*legs(6), 0.05, method="bilinear")
    C = torch.linspace(-1, 1, 6, dtype=torch.float64)
    powers = torch.stack([torch.linalg.matrix_power(A, k) @ B for k in range(24)])
    found = rational_kernel(*transfer_function(A, B, C, 24 if wrapped else 25), 24)
    return float((found - powers @ C).abs().max() / (powers @ C).abs().max())


def _responses(layer: SSM, length: int) -> Tensor:
    """The kernels ``(channels, length)`` by their definitions, from powers of dense matrices."""
    space = layer.space
    if isinstance(space, S4D):
        # Zero-order hold of each eigenvalue.
        poles = torch.complex(-space.log_decay.exp(), space.frequency)
        step = space.log_dt.exp()[:, None]
        weight = torch.view_as_complex(space.c) * ((step * poles).exp() - 1) / poles
        powers = (step * poles)[..., None] * torch.arange(length)
        return 2 * (weight[..., None] * powers.exp()).real.sum(1)
    if isinstance(space, S4):
        poles = torch.complex(-space.log_decay.exp(), space.frequency)
        poles, p, b, c = (
            torch.cat((z, z.conj()), -1)
            for z in (poles, *(torch.view_as_complex(t) for t in (space.p, space.b, space.c)))
        )
        step = space.log_dt.exp()[:, None, None]
        change = step / 2 * (torch.diag_embed(poles) - p[..., :, None] * p.conj()[..., None, :])
        left = torch.eye(poles.shape[-1]) - change
        right = torch.eye(poles.shape[-1]) + change
        transition, state = torch.linalg.solve(left, right), torch.linalg.solve(left, step[..., 0] * b)
    else:
        assert isinstance(space, RTF)
        size = space.state
        first = torch.cat((-space.a[:, None], torch.eye(size)[:-1].expand(len(space.a), -1, -1)), 1)
        eye = torch.eye(size, dtype=first.dtype)
        c = torch.linalg.solve((eye - torch.linalg.matrix_power(first, space.config.length)).mT, space.b)
        transition, state = first, eye[0].expand(len(first), -1)
    values = []
    for _ in range(length):
        values.append((c * state).sum(-1).real)
        state = (transition @ state[..., None])[..., 0]
    return torch.stack(values, -1)


def _layer_error(kernel: S4DConfig | S4Config | RTFConfig, *, skip: bool = True) -> float:
    """Largest relative error of a layer against its definition, of its gradients, and of decoding in chunks.

    Two documents in a row; the control shrinks the skip connection by a tenth.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = SSM(9, SSMConfig(kernel=kernel, channels=5)).double()
        x = torch.randn(2, 75, 9, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            layer.skip.normal_()
            if isinstance(layer.space, RTF):
                layer.space.a.normal_(std=0.04)
    u, gate = (x @ layer.project.weight.mT).chunk(2, -1)
    response, worst = _responses(layer, 75), 0.0
    parameters = [x, *layer.parameters()]
    weight = torch.linspace(-1, 1, 2 * 75 * 9, dtype=torch.float64).view(2, 75, 9)
    documents = torch.arange(75).expand(2, 75).ge(30).long()
    for start in (0, 30):
        lag = torch.arange(75)[:, None] - torch.arange(75)
        joined = (lag >= 0) & ((torch.arange(75) >= start) == (torch.arange(75)[:, None] >= start))
        toeplitz = torch.where(joined, response[:, lag.clamp_min(0)], 0.0)
        mixed = torch.einsum("hts,bsh->bth", toeplitz, u) + (1.0 if skip else 0.9) * layer.skip * u
        wanted = (mixed * gate * gate.sigmoid()) @ layer.out.weight.mT
        found = layer(x, Context(documents=documents) if start else None)
        pairs = [(found, wanted)]
        pairs += zip(*(torch.autograd.grad((weight * y).sum(), parameters, retain_graph=True) for y in (found, wanted)))
        if not start:
            with torch.no_grad():
                cache, parts = layer.new_cache(2, 75, dtype=torch.float64, device=x.device), x.split((37, 1, 2, 35), 1)
                pairs.append((torch.cat([layer(part, Context(cache=cache)) for part in parts], 1), wanted))
        worst = max(worst, *(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs))
    return worst


def _asymptote(*, printed: bool) -> float:
    """Size of an eigenvector's sum at a third of the order 48 over its asymptote."""
    d = 48
    size = abs(float(legs_eigenvector_sums(d, d // 3)[d // 3]))
    factor = math.sqrt(d) if printed else 4 / 3 * math.sqrt(2 * math.pi / 3) * d**1.5
    return size / (factor * 2 ** (-4 * d / 3))


def _solve_error(*, wrong_step: bool) -> float:
    """The O(d) solve and product against the dense ones at order 256, relative."""
    A, _ = legs(256)
    v = torch.randn(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = torch.linalg.solve(torch.eye(256, dtype=torch.float64) - 0.5 * A, v)
    found = legs_solve(v, 0.501 if wrong_step else 0.5)
    product = legs_product(v)
    return max(float((found - dense).norm() / dense.norm()), float((product - A @ v).norm() / product.norm()))


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
        seconds=0.5,
    ),
    Claim(
        name="count-to-four",
        statement="first LegS coefficient of 1, 2, 3, 4: sqrt(2) times the mean; control: 1/k for ln((k+1)/k)",
        source="derivation: the projection on a constant",
        expected=2.5 * math.sqrt(2),
        tolerance=absolute(1e-14),
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
        seconds=0.3,
    ),
    Claim(
        name="generating-function",
        statement="relative error of S4's kernel, 64 states, length 1000; control: C in place of C (I - A^L)",
        source="Gu et al., arXiv 2111.00396, Algorithm 1",
        expected=5e-14,
        tolerance=at_most(),
        measure=lambda: _kernel_error(truncated=True),
        control=lambda: _kernel_error(truncated=False),
        seconds=0.1,
    ),
    Claim(
        name="companion-output",
        statement="error of the kernel of a = (.5, -.25), b = (1, 2), L = 8 and its recurrence; control: b as output",
        source="kexue.fm 10180; derivation: C = b (I - A^L)^-1, worked to twelve digits",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _response_error(solved=True),
        control=lambda: _response_error(solved=False),
        seconds=0.1,
    ),
    Claim(
        name="kernel-of-four",
        statement="error of eight numbers of S4's kernel, d = 4, step 0.1, C of ones; control: the exact step",
        source="Gu et al., arXiv 2111.00396, section 2.3, worked to twelve digits",
        expected=1e-12,
        tolerance=at_most(),
        measure=lambda: _vector_error("bilinear"),
        control=lambda: _vector_error("exact"),
        seconds=0.1,
    ),
    Claim(
        name="transfer-function",
        statement="relative error of a kernel by its transfer function, d = 6, L = 24; control: cut one later",
        source="Parnichkun et al., arXiv 2405.06147; kexue.fm 10180",
        expected=5e-11,
        tolerance=at_most(),
        measure=lambda: _transfer_error(wrapped=True),
        control=lambda: _transfer_error(wrapped=False),
        seconds=0.1,
    ),
    Claim(
        name="recall-table",
        statement="relative distance of seven memories' errors from a table; control: 1/k for ln((k+1)/k)",
        source="kexue.fm 10114, 10137; errors measured for the derivation, to the digits given",
        expected=0.015,
        tolerance=at_most(),
        measure=lambda: _table_error(logarithm=True),
        control=lambda: _table_error(logarithm=False),
        seconds=1.0,
    ),
    *(
        Claim(
            name=f"layer-{name}",
            statement=f"relative error of a layer, {name}, its gradients and decoding; control: 0.9 of the skip",
            source=source,
            expected=1e-13,
            tolerance=at_most(),
            measure=partial(_layer_error, kernel),
            control=partial(_layer_error, kernel, skip=False),
            seconds=0.2,
        )
        for name, kernel, source in (
            ("s4d", S4DConfig(state=10), "Gu et al., arXiv 2206.11893, Listing 1 (zero-order hold)"),
            ("s4", S4Config(state=10), "Gu et al., arXiv 2111.00396, equations 3 to 5"),
            ("rtf", RTFConfig(state=10, length=75), "Parnichkun et al., arXiv 2405.06147"),
        )
    ),
    Claim(
        name="eigenvectors",
        statement="eigenvector sum of LegS at d = 48 over (4/3) sqrt(2 pi/3) d^1.5 2^(-4d/3); control: sqrt(d)",
        source="kexue.fm 10162, corrected",
        expected=1,
        tolerance=relative(0.005),
        measure=lambda: _asymptote(printed=False),
        control=lambda: _asymptote(printed=True),
        seconds=0.1,
    ),
    Claim(
        name="linear-solve",
        statement="relative error of the O(d) solve and product with LegS at order 256; control: step 0.501",
        source="Gu et al., arXiv 2008.07669, appendix E; derivation",
        expected=5e-14,
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
