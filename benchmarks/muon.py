"""Muon.step() over the matrices of three models, beside torch.optim.Muon, with the error that each update has.

Parts: ``gpt-12x384`` (12 layers of width 384: 4 square, one tall, one wide matrix a layer), ``gpt-4x256``, ``experts``
(64 experts of 128 x 384, three stacks; the peers get 192 matrices), ``share`` (the optimizer's part of a training step
of the recipe ``lm``), ``growth`` (one square matrix). The note of an implementation is the Frobenius error of its
update of a 384 x 1536 matrix to the polar factor, relative to the polar factor, for four spectra: Gaussian, log-uniform
on [1e-3, 1], a sixteenth at 1 and the rest at 1e-2, and 1/i. ``torch's steps in float32`` is the same update as torch's
with its five steps in float32: on a processor without bfloat16 units that is the stronger one. ``danlu`` takes the
faster of bfloat16 and float32, which is measured on the machine.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import harness
from danlu.models import Transformer
from danlu.nn.balance import attach
from danlu.objectives import CausalLM
from danlu.optim import MATRIX_ROLES, AdamWConfig, Muon, MuonConfig
from danlu.recipes.lm import lm
from danlu.train.device import choose

PARTS = ("gpt-12x384", "gpt-4x256", "experts", "share", "growth")
SPECTRA = ("gaussian", "log-uniform", "few large", "power law")

Shape = tuple[int, ...]
Make = Callable[[Iterable[nn.Parameter]], Optimizer]


class Float32Muon(Optimizer):
    """The peer at its best where bfloat16 is emulated: torch's update, its five steps in float32."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        for group in self.param_groups:
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                X = weight.grad.lerp(buffer, group["momentum"])
                X = X.mT if X.shape[0] > X.shape[1] else X
                X = X / X.norm().clamp(min=1e-7)
                for _ in range(5):
                    A = X @ X.mT
                    X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
                X = X.mT if weight.shape[0] > weight.shape[1] else X
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(X, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


class Refilled:
    """A peer whose step consumes the gradients: gives them back before every step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.gradients = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]

    def step(self) -> None:
        """Take one step along a copy of the gradients."""
        for parameter, gradient in self.gradients:
            parameter.grad = gradient.clone()
        self.optimizer.step()


class OptaxMuon:
    """Optax's Muon under ``jax.jit``: updates and application, on arrays of its own."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        import jax
        import optax

        self.params = list(params)
        transform = optax.contrib.muon(lr, weight_decay=0.1, consistent_rms=0.2)
        self.weights = {str(i): jax.numpy.asarray(p.detach().numpy()) for i, p in enumerate(self.params)}
        self.gradients = {str(i): jax.numpy.asarray(p.grad.numpy()) for i, p in enumerate(self.params)}
        self.state = transform.init(self.weights)

        def step(weights: object, gradients: object, state: object) -> tuple[object, object]:
            updates, state = transform.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state

        self.jitted = jax.jit(step)

    def step(self) -> None:
        """Take one step and wait for it; the parameters of torch follow, for the error."""
        self.weights, self.state = self.jitted(self.weights, self.gradients, self.state)
        for index, parameter in enumerate(self.params):
            parameter.data = torch.from_dlpack(self.weights[str(index)])


def peers() -> dict[str, Make]:
    """Return the other implementations that are installed; their updates are judged at the scale that suits them."""
    found: dict[str, Make] = {}
    with contextlib.suppress(ImportError):
        from pytorch_optimizer import Muon as KozistrMuon

        found["pytorch_optimizer"] = lambda params: KozistrMuon([{"params": list(params), "use_muon": True}], lr=1e-3)
    with contextlib.suppress(ImportError):
        from heavyball import Muon as HeavyMuon

        found["heavyball"] = lambda params: Refilled(HeavyMuon(list(params), lr=1e-3, compile_step=False))
    with contextlib.suppress(ImportError):
        import optax.contrib  # noqa: F401

        found["optax"] = lambda params: OptaxMuon(params, lr=1e-3)
    return found


CONTESTANTS: dict[str, Make] = {
    "torch": lambda params: torch.optim.Muon(params, lr=1e-3, adjust_lr_fn="match_rms_adamw"),
    "torch's steps in float32": lambda params: Float32Muon(params, lr=1e-3),
    "danlu": lambda params: Muon(params, lr=1e-3),
    "danlu float32": lambda params: Muon(params, lr=1e-3, dtype=torch.float32),
    "danlu fast": lambda params: Muon(params, lr=1e-3, method="fast"),
}
PEERS = peers()


def as_in_training() -> None:
    """Free a large block, as every backward pass does before an optimizer steps.

    From then on glibc keeps freed memory up to that size. Before, every fresh tensor costs all implementations the page
    faults of its first touch, which in some of them outweigh the arithmetic.
    """
    torch.ones(31 << 18)


def gpt(layers: int, dim: int) -> list[Shape]:
    """Shapes of the matrices of a GPT."""
    return layers * [*4 * [(dim, dim)], (4 * dim, dim), (dim, 4 * dim)]


def parameters(shapes: Sequence[Shape], *, stacked: bool) -> list[nn.Parameter]:
    """Random parameters with random gradients; a stack falls apart into matrices unless ``stacked``."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        for part in [shape] if stacked or len(shape) == 2 else shape[0] * [shape[1:]]:
            weight = nn.Parameter(torch.randn(part, generator=generator))
            weight.grad = torch.randn(part, generator=generator)
            made.append(weight)
    return made


def spectrum(name: str, m: int = 384, n: int = 1536) -> Tensor:
    """Return a matrix with the named singular values between random singular vectors, float64."""
    generator = torch.Generator().manual_seed(1)
    gaussian = torch.randn(m, n, generator=generator, dtype=torch.float64)
    if name == "gaussian":
        return gaussian
    U, _, Vh = torch.linalg.svd(gaussian, full_matrices=False)
    values = {
        "log-uniform": 10.0 ** (-3 * torch.rand(m, generator=generator, dtype=torch.float64)),
        "few large": torch.cat([torch.ones(m // 16), torch.full((m - m // 16,), 1e-2)]).double(),
        "power law": 1 / torch.arange(1, m + 1, dtype=torch.float64),
    }[name]
    return U @ torch.diag(values) @ Vh


def errors(make: Make, *, fitted: bool) -> str:
    """Return the errors of an optimizer's first update on the four spectra, ``fitted``: at its best scale."""
    found = []
    for name in SPECTRA:
        gradient = spectrum(name)
        U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
        weight = nn.Parameter(torch.zeros(gradient.shape))
        weight.grad = gradient.float()
        make([weight]).step()
        update = -weight.detach().double() / (1e-3 * 0.2 * max(weight.shape) ** 0.5)
        if fitted:
            update *= float((update * (U @ Vh)).sum() / update.square().sum())
        found.append(f"{float(torch.linalg.norm(update - U @ Vh) / torch.linalg.norm(U @ Vh)):.3f}")
    return "error " + " ".join(found)


def steps(shapes: Sequence[Shape], names: Iterable[str]) -> dict[str, harness.Run]:
    """Return one optimizer step of each named implementation."""
    make = CONTESTANTS | PEERS
    return {name: make[name](parameters(shapes, stacked=name.startswith("danlu"))).step for name in names}


def share(options: harness.Options) -> harness.Comparison:
    """Compare what the optimizer adds to forward and backward of the recipe ``lm`` in its arithmetic here."""
    run, policy = lm(), choose(threads=options.threads)
    precision = torch.get_float32_matmul_precision()
    policy.apply()
    tokens = torch.randint(4096, (run.data.batch, run.data.length), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, dims=1)

    def trained(config: AdamWConfig | MuonConfig) -> tuple[harness.Run, Optimizer]:
        torch.manual_seed(0)
        model = Transformer(run.model)
        model.compute_dtype = policy.dtype
        objective = CausalLM(model, run.objective, byte_lengths=torch.ones(4096))
        optimizer = config.build(model)
        attach(model, optimizer)

        def gradients() -> None:
            model.zero_grad(set_to_none=True)
            objective({"tokens": tokens, "targets": targets}).backward()

        gradients()
        return gradients, optimizer

    gradients, muon = trained(run.optim)
    _, adamw = trained(AdamWConfig())
    matrices = parameters(
        [tuple(p.shape) for g in muon.param_groups if g["role"] in MATRIX_ROLES for p in g["params"]], stacked=False
    )
    runs: dict[str, harness.Run] = {
        "forward and backward": gradients,
        "danlu Muon and AdamW": muon.step,
        "AdamW alone": adamw.step,
        "torch Muon, matrices alone": CONTESTANTS["torch"](matrices).step,
        "torch's steps in float32, matrices alone": CONTESTANTS["torch's steps in float32"](matrices).step,
    }
    compared = harness.compare("share of a step of lm", runs, base="forward and backward", options=options)
    torch.set_float32_matmul_precision(precision)
    return compared


def main() -> None:
    options = harness.options(__doc__, parts=PARTS, rounds=5, warmup=1)
    as_in_training()
    notes = {name: errors(make, fitted=name in PEERS) for name, make in (CONTESTANTS | PEERS).items()}
    models = {
        "gpt-12x384": gpt(1 if options.quick else 12, 384),
        "gpt-4x256": gpt(1 if options.quick else 4, 256),
        "experts": [(64, 128, 384), (64, 128, 384), (64, 384, 128)],
    }
    items: list[harness.Comparison | harness.Sweep] = []
    for part in options.parts:
        if part in models:
            runs = steps(models[part], CONTESTANTS | PEERS)
            items.append(harness.compare(part, runs, base="torch", options=options, notes=notes))
        elif part == "share":
            items.append(share(options))
        else:
            sizes = [64, 128, 256, 512] if options.quick else [64, 128, 256, 512, 1024]
            items.append(
                harness.sweep(
                    "one square matrix",
                    sizes,
                    lambda size: steps([(size, size)], ("torch", "torch's steps in float32", "danlu")),
                    options=options,
                )
            )
    harness.write("muon", __doc__, items, options)


if __name__ == "__main__":
    main()
