"""The memory of a training step, known before it is taken: the step's own code runs on tensors that have only shapes.

What a step holds at once is

    weights + gradients + optimizer state + average of the weights + micro-batches + what forward and backward pass hold

and the last term is no formula: it depends on what each layer keeps and on what is alive when the loss turns round. So
the pass runs on the meta device, where a tensor has a size and no memory, through the kernels' own code as the device
of the run would take it (`danlu._autograd.planned`), and `LiveBytes` adds up what is alive after each operation. A
kernel's own scratch memory, an allocator's rounding and what a process needs without any tensor are not in it.
"""

import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danlu._autograd import planned
from danlu.protocols import Batch
from danlu.train import rng

__all__ = ["LiveBytes", "pass_bytes", "trace_pass"]

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward", "_grouped_mm", "_scaled_mm")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside of it make, for as long as they live.

    Attributes:
        live: bytes alive now.
        peak: the most that ever was.
        moved: bytes that operations other than matrix products have read and written.
        calls: operations that were not views.

    >>> with LiveBytes() as count:
    ...     x = torch.empty(3, 5, device="meta")
    ...     y = x + 1
    ...     del x
    ...     z = y.view(15).exp()
    >>> count.live, count.peak
    (120, 120)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.moved = self.calls = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it gives."""
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        self.calls += not func.is_view
        if not func.is_view and func.overloadpacket.__name__ not in _PRODUCTS and "empty" not in func.__name__:
            both = (*tree_leaves((args, kwargs)), *tree_leaves(found))
            self.moved += sum(value.nbytes for value in both if isinstance(value, Tensor))
        return found

    def know(self, *tensors: Tensor) -> None:
        """Do not count these tensors, which were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[id(storage)] = weakref.ref(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        # A storage's Python object lives as long as the storage, views of it included.
        key, size = id(storage), storage.nbytes()
        known = self._seen.get(key)
        if known is not None and known() is not None:
            return

        def forget(_: Any) -> None:
            self.live -= size

        self.live += size
        self.peak = max(self.peak, self.live)
        self._seen[key] = weakref.ref(storage, forget)


def pass_bytes(objective: nn.Module, batch: Batch, device: str, *, accumulate: int = 1) -> int:
    """Return the most bytes alive at once while gradients of a step are made, the gradients themselves among them.

    Neither the weights nor the batch count. Nothing of ``objective`` nor of a
    random generator is changed, and no number is read.

    Args:
        objective: on any device; called with one micro-batch in training mode.
        batch: of which only sizes and dtypes count.
        device: type of the device that the run is on, whose kernels are followed.
        accumulate: micro-batches of a step. From the second on there are gradients already.

    Raises:
        NotImplementedError, RuntimeError: the objective reads a number, or an operation of it has no rule for sizes.

    >>> class Scale(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.ones(2, 5))
    ...
    ...     def forward(self, batch):
    ...         return (batch["x"] * self.weight).sum()
    >>> pass_bytes(Scale(), {"x": torch.zeros(2, 5)}, "cpu")  # the gradient and four numbers
    56
    """
    return trace_pass(objective, batch, device, accumulate=accumulate).peak


def trace_pass(
    objective: nn.Module,
    batch: Batch,
    device: str,
    *,
    accumulate: int = 1,
    weights: torch.dtype | None = None,
    keep_gradients: bool = True,
) -> LiveBytes:
    """Return the count of a pass as `pass_bytes` makes it.

    Args:
        objective, batch, device, accumulate: as there.
        weights: dtype in which the layers get their weights; None: their own.
        keep_gradients: False lets each gradient go when it is complete, as processes that cut it among them do.
    """
    held: dict[str, Tensor] = {}
    for name, parameter in objective.named_parameters():
        dtype = weights if weights is not None and parameter.is_floating_point() else parameter.dtype
        held[name] = torch.empty_like(parameter, dtype=dtype, device="meta").requires_grad_(parameter.requires_grad)
        if parameter.requires_grad and not keep_gradients:
            held[name].register_post_accumulate_grad_hook(_let_go)
    for name, buffer in objective.named_buffers():
        held[name] = torch.empty_like(buffer, device="meta")
    example = {name: torch.empty_like(value, device="meta") for name, value in batch.items()}
    attributes = [(module, dict(vars(module))) for module in objective.modules()]
    generators = rng.snapshot()
    objective.train()
    try:
        with ExitStack() as stack:
            stack.enter_context(planned(device))
            # In the backward pass as well, where a part of the forward pass may run again.
            stack.enter_context(_reparametrize_module(objective, held, tie_weights=True))
            count: LiveBytes = stack.enter_context(LiveBytes())
            count.know(*held.values(), *example.values())
            for _ in range(min(accumulate, 2)):
                loss = objective(example)
                (loss * torch.ones((), dtype=loss.dtype, device="meta")).backward()
                del loss
        return count
    finally:
        rng.restore(generators)
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None
