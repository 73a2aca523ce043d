r"""Many tokens through a recurrence at once: a block of them is a few matrix products.

For ``x <- A x + B u``, ``y = C x`` and blocks of ``r`` tokens, with ``x`` before a block,

.. math:: y_i = C A^{i+1} x + \sum_{j \le i} C A^{i-j} B\, u_j, \qquad x' = A^r x + \sum_j A^{r-1-j} B\, u_j .

All blocks share the four matrices. What goes from one block to the next is ``A^r x`` alone, so that a prompt of ``T``
tokens has ``T / r`` steps in place of ``T``; nothing is transformed, and the state that comes in is not a special case.

Shape suffixes: b batch, h channels, t time, J blocks, r tokens of a block, N state.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu._validate import integer


def rotation(z_hn: Tensor) -> Tensor:
    """Product with complex ``z``, as it acts on ``[Re x, Im x]``: ``(..., n)`` to ``(..., 2 n, 2 n)`` real.

    >>> rotation(torch.tensor([3 + 4j]))
    tensor([[ 3., -4.],
            [ 4.,  3.]])
    """
    re, im = torch.diag_embed(z_hn.real), torch.diag_embed(z_hn.imag)
    return torch.cat((torch.cat((re, -im), -1), torch.cat((im, re), -1)), -2)


@dataclass(frozen=True)
class Blocks:
    """The matrices of a block of ``r`` tokens, one of each a channel."""

    power: Tensor
    """``A^r``, ``(channels, N, N)``; complex ``(channels, N / 2)`` where that is diagonal"""
    enters: Tensor
    """inputs to state, ``(channels, r, N)``"""
    leaves: Tensor
    """state to outputs, ``(channels, N, r)``"""
    within: Tensor
    """inputs to outputs, ``(channels, r, r)``"""

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.within.shape[-1]


def blocks_of(power: Tensor, enters: Tensor, leaves: Tensor, C: Tensor) -> Blocks:
    """Blocks of ``r`` tokens from ``A^r``, ``A^i B`` and ``C A^{i+1}`` for ``i < r``, both ``(channels, r, N)``."""
    kernel, size = torch.bmm(enters, C[..., None])[..., 0], enters.shape[1]
    within = F.pad(kernel, (size - 1, 0)).unfold(-1, size, 1).mT.flip(1)
    return Blocks(power, enters.flip(1), leaves.mT.contiguous(), within.contiguous())


def form_blocks(A: Tensor, B: Tensor, C: Tensor, size: int) -> Blocks:
    """The matrices of blocks of ``size`` tokens, by doubling: ``log2 size`` products of N x N matrices a channel.

    Args:
        A: ``(channels, N, N)``, discrete.
        B: ``(channels, N)``.
        C: ``(channels, N)``.
        size: a power of two.

    Raises:
        ValueError: another size.
    """
    integer("size", size)
    if size & (size - 1):
        raise ValueError(f"size must be a power of two, got {size}")
    power, enters, leaves = A, B[:, None], torch.bmm(C[:, None], A)
    while enters.shape[1] < size:  # power is A to the number of rows
        enters = torch.cat((enters, torch.bmm(enters, power.mT)), 1)
        leaves = torch.cat((leaves, torch.bmm(leaves, power)), 1)
        power = torch.bmm(power, power)
    return blocks_of(power, enters, leaves, C)


def _carried(power: Tensor, x_hbn: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
    """From block to block: the last state, and those before each block ``(channels, batch * blocks, N)``."""
    diagonal, before = power.is_complex(), []
    if diagonal:
        x_hbn, fed = (torch.complex(*t.chunk(2, -1)) for t in (x_hbn, fed))
    for fed_hbn in fed.unbind(2):
        before.append(x_hbn)
        x_hbn = torch.addcmul(fed_hbn, x_hbn, power[:, None]) if diagonal else torch.baddbmm(fed_hbn, x_hbn, power.mT)
    met = torch.stack(before, 2).flatten(1, 2)
    return _real(x_hbn), _real(met)


def _real(x: Tensor) -> Tensor:
    """``[Re x, Im x]`` of what is complex."""
    return torch.cat((x.real, x.imag), -1) if x.is_complex() else x


def advance(blocks: Blocks, state: Tensor, u_bth: Tensor) -> tuple[Tensor, Tensor]:
    """Whole blocks of tokens: the new state and the outputs, as the recurrence gives them one by one.

    Args:
        blocks: from `form_blocks`.
        state: ``(batch, channels, N)`` real, or ``(batch, channels, N / 2)`` complex for ``[Re x, Im x]``.
        u_bth: ``(batch, time, channels)``, time a multiple of the block.

    Returns:
        The state after them and ``(batch, time, channels)``. A value that is not finite spoils its own row and channel
        only, but there what comes before it in its block too.

    >>> halves = form_blocks(torch.full((1, 1, 1), 0.5), torch.ones(1, 1), torch.ones(1, 1), 2)
    >>> advance(halves, torch.tensor([[[4.0]]]), torch.tensor([[[0.0], [0.0], [0.0], [8.0]]]))[1].flatten().tolist()
    [2.0, 1.0, 0.5, 8.25]
    """
    B, T, H = u_bth.shape
    size = blocks.size
    x, u = _real(state).transpose(0, 1), u_bth.permute(2, 0, 1).contiguous().view(H, B * T // size, size)
    x, met = _carried(blocks.power, x, torch.bmm(u, blocks.enters).view(H, B, T // size, -1))
    y = torch.baddbmm(torch.bmm(met, blocks.leaves), u, blocks.within).view(H, B, T).permute(1, 2, 0)
    x = x.transpose(0, 1)
    return torch.complex(*x.chunk(2, -1)) if state.is_complex() else x, y
