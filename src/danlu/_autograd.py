"""Hand-written derivatives that behave as PyTorch's own operations do, and caches of tensors that are safe to keep.

A hand-written backward pass is faster than a recorded one and knows nothing of what else PyTorch can do with a
function. So each has a twin, the plain formula in a few lines, and `Fused` takes the one or the other:

- the hand-written pass for ordinary tensors, forward and first derivatives;
- the plain formula where a compiler, ``torch.export``, ``torch.func``, forward mode, ``FakeTensorMode`` or another
  dispatch mode looks on, for meta tensors and tensor subclasses, and for nothing (no elements);
- the plain formula for the derivative of a derivative: a backward pass that is recorded is that of the plain formula.

``torch.autocast`` is off inside of both passes. A function of matrix products (``products``) has its inputs cast to
autocast's dtype first, as ``torch.nn.functional.linear`` does; any other computes in the dtypes it is given.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar, TypeVarTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Ts = TypeVarTuple("Ts")
T = TypeVar("T")
_Gradients = Sequence[Tensor | None]


def compiling() -> bool:
    """Whether ``torch.compile`` looks on, which takes functions of this kind, and not ``torch.export``."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def compiling_plainly() -> bool:
    """Whether ``torch.compile`` looks on and no transform: what a compiler differentiates it differentiates once."""
    return compiling() and not torch._C._are_functorch_transforms_active()


def watched() -> bool:
    """Whether operations now are traced, transformed or captured: what they give may not be kept."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


_planned: str = ""
"""The device on whose behalf meta tensors now take the passes of `Fused`."""


@contextmanager
def planned(device: str) -> Iterator[None]:
    """Let meta tensors take the ways that tensors on ``device`` (``"cpu"``, ``"cuda"``) take, to see what they hold.

    Where such a way reads numbers (how many tokens an expert has) it takes what is usual instead. A dispatch mode
    may look on without changing the way.
    """
    global _planned
    before, _planned = _planned, device
    try:
        yield
    finally:
        _planned = before


def device_type(x: Tensor) -> str:
    """The type of the device that ``x`` is on, or stands for within `planned`."""
    return _planned if _planned and x.is_meta else x.device.type


def ordinary(*inputs: Any) -> bool:
    """Whether the tensors among ``inputs`` are plain ones with numbers, without tangents, and nothing looks on."""
    if torch.compiler.is_compiling() or (torch._C._len_torch_dispatch_stack() > 0 and not _planned):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    forward_mode = forward_ad._current_level >= 0
    for x in inputs:
        if not isinstance(x, Tensor):
            continue
        if type(x) not in (Tensor, nn.Parameter) or (x.is_meta and not _planned):
            return False
        if forward_mode and forward_ad.unpack_dual(x).tangent is not None:
            return False
    return True


def readable(x: Tensor) -> bool:
    """Whether numbers of ``x`` can be looked at now: not in a trace or a batch that is mapped over, nor on meta."""
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return type(x) in (Tensor, nn.Parameter) and not x.is_meta


def kept(make: Callable[[*Ts], T]) -> Callable[[*Ts], T]:
    """``functools.lru_cache`` for a function that makes tensors of hashable arguments, one of them the device.

    What is made while something looks on (see `watched`) is not kept, nor is what was kept handed to it: a fake tensor
    or one of a captured graph would spoil every later call. What is kept is no inference tensor.
    """

    @functools.lru_cache(maxsize=64)
    def remembered(*args: *Ts) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return make(*args)

    @functools.wraps(make)
    def call(*args: *Ts) -> T:
        return make(*args) if watched() else remembered(*args)

    return call


class Fused:
    """A function of tensors with a hand-written derivative and a plain twin; call it by `of`.

    A child has three static methods:

    - ``plain(*inputs)``: the value in operations that PyTorch differentiates, of the same dtype as the fast one;
    - ``fast(ctx, *inputs)``: a tuple, the value first, then tensors (or None) to keep. ``ctx.needs`` says of each input
      whether it wants a gradient; what is no tensor may be kept on ``ctx``. The inputs themselves are kept anyway;
    - ``derivative(ctx, grad, inputs, kept)``: a gradient (or None) for each input, where nobody differentiates again.

    >>> class Cube(Fused):
    ...     @staticmethod
    ...     def plain(x):
    ...         return x**3
    ...
    ...     @staticmethod
    ...     def fast(ctx, x):
    ...         square = x * x
    ...         return x * square, square
    ...
    ...     @staticmethod
    ...     def derivative(ctx, grad, inputs, kept):
    ...         return (3 * grad * kept[0],)
    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> (slope,) = torch.autograd.grad(Cube.of(x), x, create_graph=True)
    >>> slope.item(), torch.autograd.grad(slope, x)[0].item()
    (12.0, 12.0)
    >>> torch.func.vmap(Cube.of)(torch.tensor([1.0, 2.0])).tolist()
    [1.0, 8.0]
    """

    products: ClassVar[bool] = False
    """made of matrix products, which autocast computes in its dtype"""
    linear: ClassVar[bool] = False
    """linear in its first input, of whose shape and dtype the result is: that input is not kept, and given as zeros"""
    compiled: ClassVar[bool] = False
    """a compiler takes the hand-written passes as well: the plain formula would need far more memory"""
    native: ClassVar[bool] = False
    """``fast`` is PyTorch's own function with its own derivative, which cannot be differentiated: there is no
    ``derivative``, and the plain formula stands in for the derivative of a derivative, transforms and forward mode"""

    plain: ClassVar[Callable[..., Tensor]]
    fast: ClassVar[Callable[..., tuple[Any, ...]]]
    derivative: ClassVar[Callable[..., _Gradients]]

    @classmethod
    def of(cls, *inputs: Any, by_hand: bool = True) -> Tensor:
        """Apply the function, whose first input is a tensor; ``by_hand=False``: by its plain formula in any case."""
        device = inputs[0].device.type
        if autocasts(device):
            if cls.products:
                inputs = tuple(_cast(x, torch.get_autocast_dtype(device)) for x in inputs)
            with torch.autocast(device, enabled=False):
                return cls.of(*inputs, by_hand=by_hand)
        if cls.native:
            return _native(cls, inputs)
        if not (cls.compiled and compiling()):
            by_hand = by_hand and ordinary(*inputs) and inputs[0].numel() > 0
        if not by_hand:
            return cls.plain(*inputs)
        if not compiling() and not _differentiated(inputs):
            return cls.fast(SimpleNamespace(needs=(False,) * len(inputs)), *inputs)[0]  # type: ignore[no-any-return]
        y: Tensor = _Call.apply(cls, *inputs)
        return y


def _differentiated(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: type[Fused], *inputs: Any) -> Tensor:
        ctx.own, ctx.needs = own, ctx.needs_input_grad[1:]
        y: Tensor
        y, *extra = own.fast(ctx, *inputs)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        if own.linear:
            tensors[0] = None
        ctx.save_for_backward(*tensors, *extra)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, len(ctx.others)
        inputs = [other if x is None else x for x, other in zip(saved, ctx.others)]
        device = grad.device.type
        with torch.autocast(device, enabled=False) if autocasts(device) else nullcontext():
            if not compiling() and (torch.is_grad_enabled() or not ordinary(grad) or _mapped(grad)):
                if ctx.own.linear:
                    # Not zeros_like: of several gradients in one it would be several.
                    inputs[0] = torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device)
                return None, *_of_plain(ctx.own.plain, inputs, grad, ctx.needs)
            return None, *ctx.own.derivative(ctx, grad, inputs, saved[count:])


def _native(own: type[Fused], inputs: tuple[Any, ...]) -> Tensor:
    if torch._C._are_functorch_transforms_active() or tangents(inputs):
        return own.plain(*inputs)
    if torch.compiler.is_compiling() or not _differentiated(inputs):
        return own.fast(None, *inputs)[0]  # type: ignore[no-any-return]
    wanted = [isinstance(x, Tensor) and x.requires_grad for x in inputs]
    held: list[Tensor] = []
    entered = iter(_Enter.apply(own, held, *inputs))
    y = own.fast(None, *(next(entered) if wants else x for x, wants in zip(inputs, wanted)))[0]
    left: Tensor = _Leave.apply(held, y)
    return left


class _Enter(torch.autograd.Function):
    """Around PyTorch's function: what comes back is its gradient, or, once `_Leave` held what came, the plain one."""

    @staticmethod
    def forward(ctx: Any, own: type[Fused], held: list[Tensor], *inputs: Any) -> tuple[Tensor, ...]:
        ctx.own, ctx.held = own, held
        ctx.set_materialize_grads(False)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        return tuple(x.view_as(x) for x, wants in zip(inputs, ctx.needs_input_grad[2:]) if wants)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        if not ctx.held:
            found = iter(grads)
            return None, None, *(next(found) if wants else None for wants in needs)
        grad = ctx.held.pop()
        inputs = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others)]
        device = grad.device.type
        with torch.autocast(device, enabled=False) if autocasts(device) else nullcontext():
            return None, None, *_of_plain(ctx.own.plain, inputs, grad, needs)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: list[Tensor], y: Tensor) -> Tensor:
        ctx.held = held
        ctx.set_materialize_grads(False)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None]:
        ctx.held.clear()
        if grad is None:
            return None, None
        if torch.is_grad_enabled() or _mapped(grad) or torch._C._are_functorch_transforms_active():
            ctx.held.append(grad)
            return None, None
        return None, grad


def tangents(inputs: Sequence[Any]) -> bool:
    """Whether a tensor among ``inputs`` is differentiated in forward mode."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def _differentiable(x: Tensor) -> Tensor:
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _mapped(grad: Tensor) -> bool:
    """Whether it stands for several gradients, as in ``torch.autograd.grad(is_grads_batched=True)``."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def autocasts(device: str) -> bool:
    """Whether ``torch.autocast`` is on for a device; there is none for meta."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """As autocast does: floating point of at most 32 bits."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


def _of_plain(plain: Callable[..., Tensor], inputs: Sequence[Any], grad: Tensor, needs: Sequence[bool]) -> _Gradients:
    """Gradients of the plain formula, with a graph where one is wanted."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a tensor given twice gets the gradient of each of its places.
        views = [_differentiable(x) if wanted else x for x, wanted in zip(inputs, needs)]
        wanted = [x for x, needed in zip(views, needs) if needed]
        found = iter(torch.autograd.grad(plain(*views), wanted, grad, create_graph=again, allow_unused=True))
    return [next(found) if needed else None for needed in needs]
