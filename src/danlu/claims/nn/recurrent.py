"""Causal attention read backwards into a state of constant size, and what a stack without a cache costs."""

from collections.abc import Callable

import torch
from torch import Tensor

from danlu.claims.frame import Claim, absolute, at_most, exact
from danlu.nn.attention.recurrent import RecomputeStack, RecurrentLayer, recurrent_attention


def _error(attend: Callable[[Tensor, Tensor, Tensor], Tensor], spread: float = 1.0) -> float:
    """Largest difference from causal softmax attention over 64 tokens, all or the last 50 of them, float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 64, 16, generator=generator, dtype=torch.float64)
    q, k = spread * q, spread * k
    scores = (q @ k.mT / 4).masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -torch.inf)
    wanted = scores.softmax(-1) @ v
    return max(float((attend(q[first:], k, v) - wanted[first:]).abs().max()) for first in (0, 14))


def _blocks(*, stable: bool, lag: int = 0) -> float:
    """Worst of the blocks 1, 3, 8, 64; ``lag`` keys are not there to read."""

    def attend(block: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: recurrent_attention(q, k.roll(lag, -2), v.roll(lag, -2), block=block, stable=stable)

    return max(_error(attend(block)) for block in (1, 3, 8, 64))


def _layer(q: Tensor, k: Tensor, v: Tensor) -> RecurrentLayer:
    return RecurrentLayer(lambda h, i: h @ q, lambda h, i: (h @ k, h @ v), lambda h, o: (h + o).tanh())


def _stack_error(*, late: bool = False) -> float:
    """Largest error of a stack of three layers without a cache against softmax attention over all of the past.

    The control keeps each layer's own vector out of its past.
    """
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 3, 6, 6, generator=generator, dtype=torch.float64) / 2
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    layers = [_layer(*of_layer) for of_layer in maps]
    found = torch.stack(list(RecomputeStack(layers).outputs(lambda i: x[i], 7)))
    hidden = torch.ones(7, 7).triu(0 if late else 1) > 0
    hidden[0, 0] = False
    for q, k, v in maps:
        scores = (x @ q @ (x @ k).mT / 6**0.5).masked_fill(hidden, -torch.inf)
        x = (x + scores.softmax(-1) @ (x @ v)).tanh()
    return float((found - x).abs().max())


def _example(scale: float | None) -> float:
    """Output at the third token of the source's example."""
    q = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    k = torch.tensor([[1, 0], [0, 2], [1, -1]], dtype=torch.float64)
    v = torch.tensor([[1], [2], [3]], dtype=torch.float64)
    return float(recurrent_attention(q, k, v, block=1, scale=scale)[2])


def _inputs_read() -> float:
    """How often four layers ask for an input to give nine outputs."""
    layer = RecurrentLayer(lambda h, i: h, lambda h, i: (h, h), lambda h, o: h + o)
    stack = RecomputeStack([layer] * 4)
    for _ in stack.outputs(lambda i: torch.ones(1), 9):
        pass
    return stack.calls[0]


def _inputs_read_without_reuse(level: int, i: int) -> int:
    """The same for one output, if a position's own vector is derived once for the query and again for the key."""
    if level == 0:
        return 1
    return sum(_inputs_read_without_reuse(level - 1, j) for j in (i, *range(i + 1)))


CLAIMS = (
    Claim(
        name="equals-softmax",
        statement="error against softmax attention, 64 tokens, blocks 1 to 64, no maximum; control: keys late by one",
        source="kexue.fm 10017, the recurrence; float64 rounding",
        expected=2e-15,
        tolerance=at_most(),
        measure=lambda: _blocks(stable=False),
        control=lambda: _blocks(stable=False, lag=1),
        seconds=0.1,
    ),
    Claim(
        name="large-scores",
        statement="error at scores beyond 1000 with the running maximum; control: without it",
        source="derivation: exp overflows in float64 above 709.78",
        expected=1e-15,
        tolerance=at_most(),
        measure=lambda: _error(lambda q, k, v: recurrent_attention(q, k, v, block=3), spread=30.0),
        control=lambda: _error(lambda q, k, v: recurrent_attention(q, k, v, block=3, stable=False), spread=30.0),
        seconds=0.1,
    ),
    Claim(
        name="worked-example",
        statement="third output of three tokens, scores not scaled; control: scores over the root of the size",
        source="derivation: (e + 2 e^2 + 3) / (e + e^2 + 1)",
        expected=20.496394026320 / 11.107337927390,
        tolerance=absolute(1e-12),
        measure=lambda: _example(1.0),
        control=lambda: _example(None),
        seconds=0.1,
    ),
    Claim(
        name="stack",
        statement="error of three layers without a cache against softmax attention; control: own keys left out",
        source="kexue.fm 10017, the recurrence read backwards",
        expected=1e-14,
        tolerance=at_most(),
        measure=_stack_error,
        control=lambda: _stack_error(late=True),
        seconds=0.1,
    ),
    Claim(
        name="recompute-only",
        statement="inputs read by four layers for nine outputs without a cache; control: queries derived separately",
        source="derivation: C(9 + 4, 5)",
        expected=1287,
        tolerance=exact(),
        measure=_inputs_read,
        control=lambda: sum(_inputs_read_without_reuse(4, i) for i in range(9)),
        seconds=0.2,
    ),
)
