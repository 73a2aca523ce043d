r"""Multitask sparse parity: a task list on which skills are learned one by one, and the network that learns them.

Task i is the parity of its own k of n bits. A sample holds the task's number (one-hot) and n fair bits, and a share
:math:`p_i \propto i^{-(g+1)}` of the samples asks for task i. Parity cannot be learned in part: each task's loss stays
at one bit, then falls. The step :math:`S_i` at which it has fallen scales as :math:`p_i^{-x}`, so that the mean loss, a
sum over sudden falls, is nearly a power law in steps: the experiment for what `danlu.analysis.scaling` derives.

Source: Michaud et al., "The Quantization Model of Neural Scaling", arXiv:2303.13506, section 3. ``alpha`` in the
authors' code is ``g + 1`` here, ``alpha`` in their paper is ``g``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from danlu._validate import integer, positive
from danlu.analysis.scaling import quanta_frequencies

__all__ = [
    "ParityNetwork",
    "ParityRun",
    "ParitySamples",
    "ParityTasks",
    "parity_samples",
    "parity_tasks",
    "train_parity",
]


class ParityTasks(NamedTuple):
    """A list of tasks, the most frequent first.

    Attributes:
        subsets: ``(tasks, k)`` int64, the bits whose parity is asked for, ascending.
        shares: ``(tasks,)`` float64, how often each task is asked; they sum to one.
        bits: n, of which every subset takes k.
    """

    subsets: Tensor
    shares: Tensor
    bits: int


class ParitySamples(NamedTuple):
    """Samples: ``task`` ``(B,)`` int64, ``bits`` ``(B, n)`` of zeros and ones, ``label`` ``(B,)`` int64."""

    task: Tensor
    bits: Tensor
    label: Tensor


def parity_tasks(
    tasks: int, bits: int, *, size: int = 3, g: float = 0.4, seed: int = 0, device: torch.device | str = "cpu"
) -> ParityTasks:
    """Draw the tasks: distinct subsets of the bits, with shares that fall as ``i**-(g + 1)``.

    They are drawn on the CPU, so that a seed gives the same tasks on every device.

    Args:
        tasks: how many.
        bits: n.
        size: k, the bits of a subset.
        g: exponent of the loss in the number of tasks learned, for an infinite list.
        seed: of the draw.
        device: where the tensors go.

    Raises:
        ValueError: more tasks than there are subsets, a subset larger than ``bits``.

    >>> parity_tasks(2, 5, g=1.0)
    ParityTasks(subsets=tensor([[1, 2, 4],
            [0, 1, 2]]), shares=tensor([0.8000, 0.2000], dtype=torch.float64), bits=5)
    """
    integer("bits", bits)
    integer("size", size, high=bits)
    integer("tasks", tasks, high=math.comb(bits, size))
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < tasks:
        drawn = torch.rand(tasks, bits, generator=generator, dtype=torch.float64).argsort(-1)[:, :size]
        found.update(dict.fromkeys(map(tuple, drawn.sort(-1).values.tolist())))
    shares = quanta_frequencies(tasks, g)
    return ParityTasks(torch.tensor(list(found)[:tasks], device=device), (shares / shares.sum()).to(device), bits)


def parity_samples(
    tasks: ParityTasks, which: int | Tensor, generator: torch.Generator, *, dtype: torch.dtype = torch.float32
) -> ParitySamples:
    """Draw samples on the device of the tasks and of the generator.

    Args:
        tasks: the list.
        which: how many samples, with tasks drawn by their shares; or the task of each sample, ``(B,)`` int64.
        generator: the source of tasks and bits; the same state gives the same samples.
        dtype: of the bits.

    >>> tasks = parity_tasks(2, 5)  # the parities of bits 1, 2, 4 and of bits 0, 1, 2
    >>> parity_samples(tasks, torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    ParitySamples(task=tensor([0, 1]), bits=tensor([[0., 1., 1., 0., 1.],
            [1., 1., 1., 1., 1.]]), label=tensor([1, 1]))
    """
    if isinstance(which, Tensor):
        task = which
    else:
        integer("which", which)
        task = torch.multinomial(tasks.shares, which, replacement=True, generator=generator)
    bits = torch.randint(2, (len(task), tasks.bits), generator=generator, device=task.device)
    label = bits.gather(1, tasks.subsets[task]).sum(1) % 2
    return ParitySamples(task, bits.to(dtype), label)


class ParityNetwork(nn.Module):
    """A network with one hidden ReLU layer on the one-hot task and the bits, and two logits.

    It equals a plain network on ``tasks + bits`` inputs with ``(tasks + bits + 1) width + 2 (width + 1)`` parameters,
    initialised as `torch.nn.Linear`; the product with the one-hot vector is an embedding lookup.

    Args:
        tasks, bits: lengths of the two inputs.
        width: hidden units.
        generator: for the initialisation; None: torch's default generator.
        device, dtype: of the parameters.

    >>> network = ParityNetwork(500, 100, 10)
    >>> sum(parameter.numel() for parameter in network.parameters())
    6032
    """

    def __init__(
        self,
        tasks: int,
        bits: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("tasks", tasks), ("bits", bits), ("width", width)):
            integer(name, value)

        def start(inputs: int, *shape: int) -> nn.Parameter:
            bound = inputs**-0.5
            return nn.Parameter(
                nn.init.uniform_(torch.empty(shape, device=device, dtype=dtype), -bound, bound, generator=generator)
            )

        self.of_task = start(tasks + bits, tasks, width)
        self.of_bits = start(tasks + bits, width, bits)
        self.bias = start(tasks + bits, width)
        self.head = start(width, 2, width)
        self.head_bias = start(width, 2)

    def forward(self, task: Tensor, bits: Tensor) -> Tensor:
        """Return the logits of even and odd, ``(B, 2)``, for tasks ``(B,)`` and bits ``(B, n)``."""
        hidden = functional.linear(bits, self.of_bits, self.bias) + functional.embedding(task, self.of_task)
        return functional.linear(functional.relu(hidden), self.head, self.head_bias)


class ParityRun(NamedTuple):
    """The losses of every task over a training run.

    Attributes:
        steps: ``(E,)`` int64, the steps done when the losses were measured: 0, then evenly spaced in the logarithm.
        losses: ``(E, tasks)`` float64, in bits, always on the same held-out samples.
        shares: ``(tasks,)`` float64, of the tasks.
    """

    steps: Tensor
    losses: Tensor
    shares: Tensor

    @property
    def mean_loss(self) -> Tensor:
        """Loss in bits, averaged over tasks with their shares as weights, ``(E,)``."""
        return self.losses @ self.shares

    def learned_at(self, threshold: float = 0.1) -> Tensor:
        """Return the first of ``steps`` at which each task's loss is below the threshold, ``(tasks,)`` float64.

        Infinite where it never is. ``threshold`` is in bits.

        >>> losses = torch.tensor([[1.0, 1.0], [0.3, 1.0], [0.01, 0.9]])
        >>> ParityRun(torch.tensor([0, 10, 20]), losses, torch.tensor([0.8, 0.2])).learned_at()
        tensor([20., inf], dtype=torch.float64)
        """
        positive("threshold", threshold)
        steps = self.steps.double()[:, None].expand(self.losses.shape)
        return steps.masked_fill(self.losses >= threshold, math.inf).amin(0)


def train_parity(
    network: nn.Module,
    tasks: ParityTasks,
    *,
    steps: int,
    batch: int,
    lr: float = 1e-3,
    points: int = 100,
    held_out: int = 64,
    seed: int = 0,
) -> ParityRun:
    """Train a network with Adam and cross-entropy on a stream of new samples; return every task's loss over steps.

    Args:
        network: takes ``task`` and ``bits`` of `ParitySamples` and returns two logits; it is trained in place.
        tasks: on the network's device.
        steps, batch, lr: of the training.
        points: about how many times to measure the losses, evenly spaced in the logarithm of the step.
        held_out: samples of each task that the losses are measured on.
        seed: of the training stream and of the held-out samples.

    >>> tasks = parity_tasks(3, 6, size=1)
    >>> network = ParityNetwork(3, 6, 64, generator=torch.Generator().manual_seed(0))
    >>> run = train_parity(network, tasks, steps=300, batch=100, lr=1e-2)
    >>> run.learned_at().amax() < 150
    tensor(True)
    """
    for name, value in (("steps", steps), ("batch", batch), ("points", points), ("held_out", held_out)):
        integer(name, value)
    positive("lr", lr)
    device = tasks.subsets.device
    dtype = next(network.parameters()).dtype
    generator = torch.Generator(device).manual_seed(seed)
    asked = torch.arange(len(tasks.shares), device=device).repeat_interleave(held_out)
    unseen = parity_samples(tasks, asked, generator, dtype=dtype)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
    stops = torch.logspace(0, math.log10(steps), points).round().long().unique().tolist()
    losses = [_task_losses(network, unseen, held_out)]
    done = 0
    for stop in stops:
        for _ in range(done, stop):
            samples = parity_samples(tasks, batch, generator, dtype=dtype)
            optimizer.zero_grad()
            functional.cross_entropy(network(samples.task, samples.bits), samples.label).backward()
            optimizer.step()
        done = stop
        losses.append(_task_losses(network, unseen, held_out))
    return ParityRun(torch.tensor([0, *stops], device=device), torch.stack(losses), tasks.shares)


@torch.no_grad()
def _task_losses(network: nn.Module, samples: ParitySamples, each: int) -> Tensor:
    """Return the mean loss of each task in bits; the samples of a task follow one another."""
    losses = functional.cross_entropy(network(samples.task, samples.bits), samples.label, reduction="none")
    return losses.double().view(-1, each).mean(1) / math.log(2)
