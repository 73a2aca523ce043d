"""Steps of the elementwise optimizers and of gradient clipping over the 21 M weights of a 12-layer GPT of width 384.

Parts: ``step`` (torch's fused AdamW, Lion, Tiger and Amos, as they are and by ``torch.compile(optimizer.step)``, and
pytorch_optimizer's Lion where it is installed),
``clip`` (the global norm when there is nothing to clip),
``growth`` (over the number of weights). The note of a step is its state in bytes for each byte of weights, and for
danlu's Lion and Tiger the largest distance of the weights from the published program after five steps in float64.
"""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks import harness
from benchmarks.muon import Shape, as_in_training, gpt, parameters
from danlu.optim import Amos, Lion, Tiger, clip_grad_norm_

PARTS = ("step", "clip", "growth")
Make = Callable[[Iterable[nn.Parameter]], Optimizer]

CONTESTANTS: dict[str, Make] = {
    "torch AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
    "torch AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4, foreach=False),
    "danlu Lion": lambda params: Lion(params, lr=1e-4, weight_decay=0.1),
    "danlu Lion foreach": lambda params: Lion(params, lr=1e-4, weight_decay=0.1, foreach=True),
    "danlu Tiger": lambda params: Tiger(params, lr=1e-3),
    "danlu Amos": lambda params: Amos(params, lr=0.01, momentum=0.9),
    "danlu Amos without momentum": lambda params: Amos(params, lr=0.01),
    "danlu Lion compiled": lambda params: _compiled(Lion(params, lr=torch.tensor(1e-4), weight_decay=0.1)),
    "danlu Tiger compiled": lambda params: _compiled(Tiger(params, lr=torch.tensor(1e-3))),
    "danlu Amos compiled": lambda params: _compiled(Amos(params, lr=torch.tensor(0.01), momentum=0.9)),
}


def _compiled(optimizer: Optimizer) -> Optimizer:
    """Compile the step, with a learning rate that may change without compiling again."""
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def _peer(params: Iterable[nn.Parameter]) -> Optimizer:
    import pytorch_optimizer

    peer: Any = pytorch_optimizer.Lion
    return peer(params, lr=1e-4, weight_decay=0.1)  # type: ignore[no-any-return]


if importlib.util.find_spec("pytorch_optimizer"):
    CONTESTANTS["pytorch_optimizer Lion"] = _peer


def made(name: str, shapes: Sequence[Shape]) -> Optimizer:
    """Return one implementation after its first step, over parameters of its own."""
    optimizer = CONTESTANTS[name](parameters(shapes, stacked=True))
    optimizer.step()
    return optimizer


def state_ratio(optimizer: Optimizer) -> str:
    """Return the bytes of state for each byte of weights, as a note."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    state = sum(t.nbytes for p in weights for t in optimizer.state[p].values() if isinstance(t, torch.Tensor))
    return f"state {state / sum(p.nbytes for p in weights):.2f}"


def distance(name: str) -> float:
    """Return how far Lion or Tiger is from its source's formulas after five steps, as a largest difference."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, 251, generator=generator, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = CONTESTANTS[name]([weight])
    exact, momentum = start.clone(), torch.zeros_like(start)
    for _ in range(5):
        gradient = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        if "Lion" in name:
            direction, size, decay = torch.sign(0.9 * momentum + 0.1 * gradient), 1e-4, 0.1
            momentum = 0.99 * momentum + 0.01 * gradient
        else:
            momentum = 0.965 * momentum + 0.035 * gradient
            direction, size, decay = torch.sign(momentum), 1e-3 * exact.square().mean().sqrt(), 0.01
        exact = exact - size * (direction + decay * exact)
    return float((weight.detach() - exact).abs().max())


def note(name: str, optimizer: Optimizer) -> str:
    """Return what stands beside a step."""
    return state_ratio(optimizer) + (
        f", distance {distance(name):.1e}" if name.startswith(("danlu Lion", "danlu Tiger")) else ""
    )


def clipping(shapes: Sequence[Shape]) -> dict[str, harness.Run]:
    """Return both clipping functions, with a threshold far above the norm."""
    ours, theirs = parameters(shapes, stacked=True), parameters(shapes, stacked=True)
    return {
        "torch, nothing to clip": lambda: torch.nn.utils.clip_grad_norm_(theirs, 1e9),
        "danlu, nothing to clip": lambda: clip_grad_norm_(ours, 1e9),
    }


def main() -> None:
    options = harness.options(__doc__, parts=PARTS)
    as_in_training()
    shapes = gpt(1 if options.quick else 12, 384)
    items: list[harness.Comparison | harness.Sweep] = []
    if "step" in options.parts:
        optimizers = {name: made(name, shapes) for name in CONTESTANTS}
        items.append(
            harness.compare(
                "one step",
                {name: optimizer.step for name, optimizer in optimizers.items()},
                base="torch AdamW fused",
                options=options,
                notes={name: note(name, optimizer) for name, optimizer in optimizers.items()},
            )
        )
    if "clip" in options.parts:
        items.append(harness.compare("clipping", clipping(shapes), base="torch, nothing to clip", options=options))
    if "growth" in options.parts:
        sizes = [1 << power for power in ((16, 18, 20) if options.quick else (16, 18, 20, 22, 24))]
        runs = ("torch AdamW fused", "danlu Lion", "danlu Tiger")
        items.append(
            harness.sweep(
                "one vector",
                sizes,
                lambda size: {name: made(name, [(size // 1024, 1024)]).step for name in runs},
                options=options,
                axis="weights",
            )
        )
    harness.write("elementwise", __doc__, items, options)


if __name__ == "__main__":
    main()
