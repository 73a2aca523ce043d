"""Random compositions of conditions: whatever is combined, the result is that of the plain formula, or an error.

``python -m pytest tests/contract/test_compositions.py --hypothesis-profile=many`` tries 2,200 of them, 50 a function.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from contract.conditions import HALF, close, inputs_of, leaves, towards
from contract.support import CASES
from contract.table import Case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

Function = Callable[..., Tensor]


class Watching(TorchDispatchMode):
    """Sees every operation and changes none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Conditions:
    activations: torch.dtype
    weights: torch.dtype
    autocast: torch.dtype | None
    batch: int
    layout: str
    around: tuple[str, ...]
    derivative: str


def conditions() -> st.SearchStrategy[Conditions]:
    dtypes = st.sampled_from([torch.float64, torch.float32, *HALF])
    around = st.sampled_from(["checkpoint", "reentrant", "watching", "vmap", "fake before", "inference before", "meta"])
    return st.builds(
        Conditions,
        activations=dtypes,
        weights=dtypes,
        autocast=st.sampled_from([None, None, *HALF]),
        batch=st.sampled_from([0, 1, 4]),
        layout=st.sampled_from(["as made", "transposed", "strided"]),
        around=st.lists(around, max_size=3, unique=True).map(tuple),
        derivative=st.sampled_from(["none", "first", "kept", "second", "func", "batched"]),
    )


def laid(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack((x, x), -1)[..., 0] if layout == "strided" else x


def wrapped(function: Function, case: Case, around: tuple[str, ...], inputs: list[Tensor]) -> Function:
    """Wrap the function in what goes around a call, and do before it what could leave something behind."""
    count = len(case.activations(1, 1))
    for name in around:
        inner = function
        if name == "checkpoint":
            function = lambda *xs, f=inner: checkpoint(f, *xs, use_reentrant=False)  # noqa: E731
        elif name == "reentrant":
            function = lambda *xs, f=inner: checkpoint(f, *xs, use_reentrant=True)  # noqa: E731
        elif name == "watching":

            def function(*xs: Tensor, f: Function = inner) -> Tensor:
                with Watching():
                    return f(*xs)

        elif name == "vmap" and inputs[0].shape[0]:

            def function(*xs: Tensor, f: Function = inner) -> Tensor:
                one = lambda *ys: f(*(y[None] for y in ys[:count]), *ys[count:])  # noqa: E731
                axes = tuple(0 if i < count else None for i in range(len(xs)))
                y = torch.func.vmap(one, axes)(*xs)
                return y.sum() if case.loss else y.flatten(0, 1)

        elif name == "fake before":
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                inner(*[mode.from_tensor(x) for x in inputs])
        elif name == "inference before":
            with torch.inference_mode():
                inner(*inputs)
        elif name == "meta":
            inner(*[x.detach().to("meta") for x in inputs])
    return function


def derived(function: Function, inputs: list[Tensor], derivative: str) -> list[Tensor | None]:
    """The value and what was asked for besides."""
    at = leaves(inputs)
    if derivative == "func":
        numbers = tuple(i for i, x in enumerate(inputs) if x.requires_grad)

        def scalar(*xs: Tensor) -> Tensor:
            y = function(*xs)
            return (y * towards(y)).sum()

        plain = [x.detach() for x in inputs]
        return [function(*plain), *torch.func.grad(scalar, numbers)(*plain)]
    y = function(*inputs)
    if derivative == "none":
        return [y]
    if derivative == "batched":
        upstream = torch.stack((towards(y), 2 * towards(y)))
        return [y, *torch.autograd.grad(y, at, upstream, is_grads_batched=True, allow_unused=True)]
    found = torch.autograd.grad(
        y,
        at,
        towards(y),
        retain_graph=derivative != "first",
        create_graph=derivative == "second" and inputs[0].numel() > 0,
        allow_unused=True,
    )
    if derivative == "kept":
        return [y, *torch.autograd.grad(y, at, towards(y), allow_unused=True)]
    if derivative == "second" and y.numel():
        total = sum((g.double() ** 2).sum() for g in found if g is not None)
        if isinstance(total, Tensor) and total.requires_grad:
            return [y, *found, *torch.autograd.grad(total, at, allow_unused=True)]
    return [y, *found]


KNOWN = (
    "use_reentrant=True",
    "follow_loss",
    "vmap",
    "Batching rule",
    "saved tensor hooks",
    "torch.utils.checkpoint",
    "functorch",
)
"""Words of errors about what is not combined: PyTorch's own, and that an auxiliary loss has to be told the loss."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@given(conditions())
def test_any_combination_is_right_or_raises(case: Case, c: Conditions) -> None:
    count = len(case.activations(1, 1))
    inputs = []
    for i, x in enumerate(inputs_of(case, batch=c.batch)):
        dtype = c.activations if i < count else c.weights
        x = laid(x.detach().to(dtype) if x.is_floating_point() else x, c.layout)
        inputs.append(x.requires_grad_(x.is_floating_point()))
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    expected = derived(case.plain, exact, c.derivative)
    rounding = max(torch.finfo(d).eps for d in (c.activations, c.weights, c.autocast) if d is not None)
    # Two inversions and a derivative of each lose a digit, of which 16 bits have none to spare.
    lost = 8 if c.derivative == "second" and rounding < 1e-6 else 1
    tolerance = min(case.slack * 16 * rounding * lost + 1e-9, 0.25)

    def call(*xs: Tensor) -> Tensor:
        with torch.autocast("cpu", c.autocast or torch.bfloat16, enabled=c.autocast is not None):
            return fast(*xs)

    try:
        fast = wrapped(case.fast, case, c.around, inputs)
        found = derived(call, inputs, c.derivative)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if any(word in str(error) for word in (*KNOWN, *case.raises.values())):
            return
        raise
    # What cancels in a small derivative has the size of the large ones.
    floor = max(float(t.norm()) for t in expected if t is not None) / 10
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None or one.numel() == 0:
            assert all(t is None or not t.any() for t in (one, other))
        else:
            close(one, other, tolerance, floor=floor)
