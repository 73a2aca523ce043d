"""The conditions of the contract: each takes a case of the table and asserts that it is right, in float64.

``CONDITIONS`` holds them in the order of the support matrix. A new one is a function of a `Case` under ``@condition``.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from contract.table import Case
from tensors import gaussian
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Condition:
    """Something else that PyTorch does with a function; ``check`` raises what the function does, or AssertionError."""

    name: str
    check: Callable[[Case], None]


CONDITIONS: list[Condition] = []


def condition(name: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Add a condition to the contract, under the name that the support matrix gives it."""

    def add(check: Callable[[Case], None]) -> Callable[[Case], None]:
        CONDITIONS.append(Condition(name, check))
        return check

    return add


def close(found: object, expected: object, rtol: float = 1e-10, floor: float = 0.0) -> None:
    """Compare tensors, or sequences of them, by the norm of the difference; NaN is close to nothing.

    ``floor`` is the norm below which nothing is asked of the digits.
    """
    if isinstance(expected, (tuple, list)):
        assert isinstance(found, (tuple, list))
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            close(one, other, rtol, floor)
        return
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm()
    assert error <= rtol * max(expected.double().norm(), floor) + 1e-30, f"error {error} of {expected.double().norm()}"


def inputs_of(case: Case, batch: int = 3, time: int = 7, *, grad: bool = True) -> list[Tensor]:
    """Fresh leaves: activations, then weights."""
    made = [*case.activations(batch, time), *case.weights()]
    return [x.clone().requires_grad_(grad and x.is_floating_point()) for x in made]


def leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in inputs if x.requires_grad]


def towards(y: Tensor) -> Tensor:
    """A cotangent, and weights that make a scalar of ``y`` for which no symmetry gives a gradient of zero."""
    return (torch.arange(y.numel(), device=y.device, dtype=torch.float64) + 1).cos().view(y.shape).to(y.dtype)


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A number that is no linear function of the result."""

    def call(*inputs: Tensor) -> Tensor:
        y = function(*inputs)
        return (y * towards(y)).pow(2).sum()

    return call


def value_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    y = function(*inputs)
    return y, *torch.autograd.grad(y, leaves(inputs), towards(y))


def expected_of(case: Case, **sizes: int) -> tuple[Tensor, ...]:
    return value_and_gradients(case.plain, inputs_of(case, **sizes))


def second(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """A Hessian-vector product with respect to everything, the cotangent as well."""
    y = function(*inputs)
    upstream = towards(y).requires_grad_()
    first = torch.autograd.grad((y * upstream).pow(2).sum() / 2, leaves(inputs), create_graph=True)
    along = sum((g * gaussian(*g.shape, seed=4 + i)).sum() for i, g in enumerate(first))
    assert isinstance(along, Tensor)
    return [*first, *torch.autograd.grad(along, [*leaves(inputs), upstream])]


@condition("values and gradients")
def values_and_gradients(case: Case) -> None:
    close(value_and_gradients(case.fast, inputs_of(case)), expected_of(case))


@condition("second derivatives")
def second_derivatives(case: Case) -> None:
    """By grad, by backward, and of a tensor that is given twice: both its places count."""
    close(second(case.fast, inputs_of(case)), second(case.plain, inputs_of(case)), 1e-8)
    inputs = inputs_of(case)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reference cycle")
        scalar(case.fast)(*inputs).backward(create_graph=True)
    total = sum(x.grad.pow(2).sum() for x in leaves(inputs) if x.grad is not None)
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, leaves(inputs))
    inputs = inputs_of(case)
    first = torch.autograd.grad(scalar(case.plain)(*inputs), leaves(inputs), create_graph=True)
    close(found, torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves(inputs)), 1e-8)  # type: ignore[arg-type]
    results = []
    for function in (case.fast, case.plain):
        inputs = inputs_of(case)
        shared = leaves(inputs)[0]
        both = [x * (0.3 * shared.flatten()[1]).exp() if x.requires_grad else x for x in inputs]
        (slope,) = torch.autograd.grad(scalar(function)(*both), shared, create_graph=True)
        results.append(torch.autograd.grad((slope * towards(slope)).sum(), shared))
    close(results[0], results[1], 1e-8)


@condition("forward mode")
def forward_mode(case: Case) -> None:
    inputs = inputs_of(case, grad=False)
    floats = [i for i, x in enumerate(inputs) if x.is_floating_point()]
    directions = tuple(gaussian(*inputs[i].shape, seed=i) for i in floats)

    def of_floats(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*values: Tensor) -> Tensor:
            whole = list(inputs)
            for i, value in zip(floats, values):
                whole[i] = value
            return function(*whole)

        return call

    values = tuple(inputs[i] for i in floats)
    expected = torch.func.jvp(of_floats(case.plain), values, directions)
    close(torch.func.jvp(of_floats(case.fast), values, directions), expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d) for x, d in zip(values, directions)]
        close(list(forward_ad.unpack_dual(of_floats(case.fast)(*duals))), list(expected))


def _mapped(case: Case, function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], tuple[int | None, ...]]:
    """The function of one sample, and the axes along which samples lie."""
    count = len(case.activations(1, 1))
    axes = tuple(0 if i < count else None for i in range(len(inputs_of(case))))
    return lambda *xs: scalar(function)(*(x[None] for x in xs[:count]), *xs[count:]), axes


def _floats(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(inputs) if x.is_floating_point())


@condition("torch.func.grad")
def torch_func_grad(case: Case) -> None:
    inputs = inputs_of(case, grad=False)
    at = _floats(inputs)
    close(torch.func.grad(scalar(case.fast), at)(*inputs), torch.func.grad(scalar(case.plain), at)(*inputs), 1e-9)


@condition("torch.func.vmap, per-sample gradients")
def torch_func_vmap(case: Case) -> None:
    inputs = inputs_of(case, grad=False)
    fast, axes = _mapped(case, case.fast)
    plain, _ = _mapped(case, case.plain)
    close(torch.func.vmap(fast, axes)(*inputs), torch.func.vmap(plain, axes)(*inputs))
    at = _floats(inputs)
    expected = torch.func.vmap(torch.func.grad(plain, at), axes)(*inputs)
    close(torch.func.vmap(torch.func.grad(fast, at), axes)(*inputs), expected, 1e-9)


@condition("torch.func, Hessians")
def torch_func_hessian(case: Case) -> None:
    inputs = inputs_of(case, grad=False)
    at = _floats(inputs)[0]
    hessian = torch.func.jacfwd(torch.func.grad(scalar(case.fast), at), at)(*inputs)
    close(hessian, torch.func.jacfwd(torch.func.grad(scalar(case.plain), at), at)(*inputs), 1e-8)


@condition("is_grads_batched")
def a_batch_of_cotangents(case: Case) -> None:
    results = []
    for function in (case.fast, case.plain):
        inputs = inputs_of(case)
        y = function(*inputs)
        upstream = gaussian(4, *y.shape, seed=9)
        results.append(torch.autograd.grad(y, leaves(inputs), upstream, is_grads_batched=True))
    close(*results)


def _sixteen_bits(case: Case, activations: torch.dtype) -> None:
    """Activations in 16 bits with weights of every kind."""
    count = len(case.activations(1, 1))
    for weights in (torch.float32, *HALF) if case.weights() else (activations,):
        low = [
            x.detach().to(activations if i < count else weights).requires_grad_() if x.is_floating_point() else x
            for i, x in enumerate(inputs_of(case))
        ]
        exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in low]
        found = value_and_gradients(case.fast, low)
        result = activations if low[0].is_floating_point() else weights
        assert [x.dtype for x in found] == [torch.float32 if case.loss else result, *(x.dtype for x in leaves(low))]
        y = case.plain(*exact)
        expected = (y, *torch.autograd.grad(y, leaves(exact), towards(found[0]).double()))
        rtol = 3 * case.slack * max(torch.finfo(activations).eps, torch.finfo(weights).eps)
        close(found, expected, rtol)
        with torch.no_grad():
            close(case.fast(*low), y, rtol)


@condition("bfloat16")
def in_bfloat16(case: Case) -> None:
    _sixteen_bits(case, torch.bfloat16)


@condition("float16")
def in_float16(case: Case) -> None:
    _sixteen_bits(case, torch.float16)


def _autocast(case: Case, dtype: torch.dtype) -> None:
    """The backward pass inside of autocast's region and outside."""
    for inside in (True, False):
        inputs = [x.detach().float().requires_grad_() if x.is_floating_point() else x for x in inputs_of(case)]
        with torch.autocast("cpu", dtype):
            y = case.fast(*inputs)
            found = [y, *torch.autograd.grad(y, leaves(inputs), towards(y), retain_graph=True)]
        if not inside:
            found = [y, *torch.autograd.grad(y, leaves(inputs), towards(y))]
        assert y.dtype == (dtype if case.products and not case.loss else torch.float32)
        exact = inputs_of(case)
        expected = case.plain(*exact)
        rounds = case.products or (case.recorded and inside)
        rtol = case.slack * (4 * torch.finfo(dtype).eps if rounds else 1e-5)
        close(found, [expected, *torch.autograd.grad(expected, leaves(exact), towards(y).double())], rtol)


@condition("autocast, bfloat16")
def autocast_bfloat16(case: Case) -> None:
    _autocast(case, torch.bfloat16)


@condition("autocast, float16")
def autocast_float16(case: Case) -> None:
    _autocast(case, torch.float16)


@condition("torch.compile(fullgraph=True)")
def compiled_without_a_break(case: Case) -> None:
    """With fixed and with open sizes (heavy: one kind, traced and run), and eager afterwards."""
    for dynamic in (case.dynamic is not None,) if case.heavy else (False, True):
        torch._dynamo.reset()
        backend = "eager" if case.heavy else "aot_eager"
        compiled = torch.compile(case.fast, fullgraph=True, backend=backend, dynamic=dynamic)
        close(value_and_gradients(compiled, inputs_of(case)), expected_of(case))
        if dynamic:
            close(value_and_gradients(compiled, inputs_of(case, batch=5)), expected_of(case, batch=5))
        if not case.heavy:
            with torch.no_grad():
                close(compiled(*inputs_of(case)), case.plain(*inputs_of(case)))
        close(value_and_gradients(case.fast, inputs_of(case)), expected_of(case))


class _Module(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.function = case.fast
        self.held = torch.nn.ParameterList(torch.nn.Parameter(w.clone()) for w in case.weights())

    def forward(self, *activations: Tensor) -> Tensor:
        return self.function(*activations, *self.held)


@condition("torch.export, open batch and time")
def exported(case: Case) -> None:
    """Strict and not strict (what takes seconds, the latter only), and eager afterwards."""
    axes = {0: torch.export.Dim.AUTO}
    if case.dynamic is not None:
        axes[case.dynamic] = torch.export.Dim.AUTO
    activations = case.activations(3, 7)
    for strict in (False,) if case.heavy else (False, True):
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="While compiling, we found certain side effects")
            program = torch.export.export(
                _Module(case), activations, dynamic_shapes=((axes,) * len(activations),), strict=strict
            ).module()
        for batch, time in [(3, 7), (4, 6), (2, 9)]:
            expected = case.plain(*inputs_of(case, batch, time))
            close(program(*case.activations(batch, time)), expected)
            close(case.fast(*inputs_of(case, batch, time)), expected)


@condition("FakeTensorMode")
def fake_tensors(case: Case) -> None:
    """The shapes are right, a real call between two fake ones too."""
    expected = expected_of(case, batch=2)
    inputs = inputs_of(case, batch=2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in inputs]
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y = case.fast(*fake)
            assert (y.shape, y.dtype) == (expected[0].shape, expected[0].dtype)
        shapes = [x.shape for x in torch.autograd.grad(case.fast(*fake).sum(), leaves(fake))]
        assert shapes == [x.shape for x in expected[1:]]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(case.fast(*inputs_of(case, batch=2)), expected[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        case.fast(*[mode.from_tensor(x) for x in inputs])


@condition("meta device")
def meta_tensors(case: Case) -> None:
    expected = expected_of(case, batch=2)
    meta = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in inputs_of(case, batch=2)]
    y = case.fast(*meta)
    assert (y.shape, y.dtype) == (expected[0].shape, expected[0].dtype)
    assert [x.shape for x in torch.autograd.grad(y.sum(), leaves(meta))] == [x.shape for x in expected[1:]]
    with torch.no_grad():
        assert case.fast(*meta).shape == y.shape


@condition("inference mode")
def inference_mode(case: Case) -> None:
    """And training afterwards."""
    with torch.inference_mode():
        found = case.fast(*inputs_of(case, batch=4))
    expected = expected_of(case, batch=4)
    close(found.clone(), expected[0])
    close(value_and_gradients(case.fast, inputs_of(case, batch=4)), expected)


def _checkpointed(case: Case, reentrant: bool) -> None:
    inputs = inputs_of(case)
    y = checkpoint(case.fast, *inputs, use_reentrant=reentrant)
    y.backward(towards(y))
    close([x.grad for x in leaves(inputs)], expected_of(case)[1:])


@condition("activation checkpointing")
def activation_checkpointing(case: Case) -> None:
    _checkpointed(case, False)


@condition("activation checkpointing, reentrant")
def reentrant_checkpointing(case: Case) -> None:
    _checkpointed(case, True)


@condition("any layout")
def any_layout(case: Case) -> None:
    """Of inputs and of what comes from above."""
    for change in (
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: torch.stack((x, x), -1)[..., 0],
        lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    ):
        inputs = inputs_of(case)
        laid = [change(x.detach()).requires_grad_(x.requires_grad) if x.dim() else x for x in inputs]
        close(value_and_gradients(case.fast, laid), expected_of(case))
    inputs, plain = inputs_of(case), inputs_of(case)
    found, expected = case.fast(*inputs), case.plain(*plain)
    one = torch.tensor(0.7, dtype=torch.float64)
    close(
        torch.autograd.grad(found, leaves(inputs), one.expand_as(found)),
        torch.autograd.grad(expected, leaves(plain), one.expand_as(expected)),
    )


@condition("empty batch")
def an_empty_batch(case: Case) -> None:
    inputs = inputs_of(case, batch=0)
    y = case.fast(*inputs)
    assert y.shape == case.plain(*inputs).shape
    found = torch.autograd.grad(y.sum(), leaves(inputs), allow_unused=True)
    for x, g in zip(leaves(inputs), found):
        assert g is None or (g.shape == x.shape and not g.any())
    with torch.no_grad():
        assert case.fast(*inputs).shape == y.shape


@condition("retain_graph")
def a_graph_kept_gives_the_same_gradients_again(case: Case) -> None:
    inputs = inputs_of(case)
    y = case.fast(*inputs)
    first = torch.autograd.grad(y, leaves(inputs), towards(y), retain_graph=True)
    again = torch.autograd.grad(y, leaves(inputs), towards(y))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
