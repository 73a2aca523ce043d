"""Batches of windows out of one long stream of tokens, shuffled, sharded, and resumable by one integer.

Every document ends with ``<|end|>``. That token also opens the document after it: from it alone the first token is
predicted, which is how sampling begins without a prompt, and every token of the text is a target exactly once.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu._validate import integer
from danlu.data.joined import Joined
from danlu.data.position import Positioned, check_shares
from danlu.data.shuffle import keys, permute
from danlu.protocols import IGNORE

_BLOCK = 4096
Batch = dict[str, Tensor]


class Loader(Positioned):
    """An endless, deterministic stream of training batches over a stream of tokens.

    The stream is a ring (its last token is ``<|end|>``, so the seam is a boundary like any other). An epoch starts at
    a random place, cuts the ring into ``len(tokens) // length`` windows, and visits each once in a random order; place
    and order are functions of ``(seed, epoch)``, so the state is the number of windows taken by all ranks together.
    No random generator is involved, and none is touched.

    Args:
        tokens: ``(n,)`` unsigned integers, usually memory-mapped, or several such as one; at least ``length + 1``.
        end: id of the token that separates documents.
        length: tokens in a window.
        batch: windows in a batch over all ranks together; each rank takes ``batch // world`` of them.
        seed: selects the order.
        rank: this process, in ``range(world)``.
        world: number of processes.
        sha256: identity of the tokens, checked on resume.
        pin: put batches in page-locked memory, for asynchronous copies to an accelerator.

    Yields dictionaries of ``tokens`` and ``targets``, int64 of shape ``(batch // world, length)``, and, only when a
    row holds more than one document, ``documents``, int32 of the same shape: attention stays among equal numbers.

    >>> loader = Loader(np.array([5, 6, 7, 0, 8, 9, 0], dtype=np.uint16), end=0, length=3, batch=2, seed=1)
    >>> state = loader.state_dict()
    >>> first = next(loader)["tokens"]
    >>> loader.load_state_dict(state)
    >>> bool((next(loader)["tokens"] == first).all())
    True
    """

    def __init__(
        self,
        tokens: NDArray[Any] | Joined,
        *,
        end: int,
        length: int,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        sha256: str = "",
        pin: bool = False,
    ) -> None:
        integer("length", length, high=len(tokens) - 1)
        super().__init__(batch, rank=rank, world=world, identity={"seed": seed, "length": length, "sha256": sha256})
        self.tokens, self.end, self.length = tokens, end, length
        self.seed, self.sha256, self.pin = seed, sha256, pin
        self.windows = len(tokens) // length
        self._joined = joined(tokens)
        self._block = (-1, -1)
        self._starts = np.empty(0, dtype=np.int64)

    def batch_at(self, numbers: range) -> Batch:
        """Return the windows with these numbers as a batch."""
        return assemble(self.rows(numbers.start, len(numbers)), self.end, pin=self.pin)

    @property
    def epoch(self) -> float:
        """Passes over the tokens so far, all ranks together."""
        return self.position / self.windows

    def rows(self, position: int, count: int) -> NDArray[Any]:
        """Return windows ``position`` to ``position + count - 1`` of the run, ``(count, length + 1)``."""
        return self._joined.rows(self.starts(position, count), self.length + 1)

    def starts(self, position: int, count: int) -> NDArray[np.int64]:
        """Return where windows ``position`` to ``position + count - 1`` of the run begin in the stream."""
        parts = []
        while count > 0:
            epoch, index = divmod(position, self.windows)
            block, inside = divmod(index, _BLOCK)
            if (epoch, block) != self._block:
                self._starts = self._compute(epoch, block)
                self._block = (epoch, block)
            parts.append(self._starts[inside : inside + count])
            position += len(parts[-1])
            count -= len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _compute(self, epoch: int, block: int) -> NDArray[np.int64]:
        key = keys("windows", self.seed, epoch)
        index = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.windows))
        offset = int(key[-1]) % len(self.tokens)
        return (permute(index, self.windows, key) * self.length + offset) % len(self.tokens)


def assemble(rows: NDArray[Any], end: int, *, pin: bool = False) -> Batch:
    """Turn rows of ``length + 1`` consecutive tokens, ``(b, length + 1)``, into a batch.

    >>> batch = assemble(np.array([[7, 0, 8, 9]]), end=0)
    >>> batch["tokens"].tolist(), batch["targets"].tolist(), batch["documents"].tolist()
    ([[7, 0, 8]], [[0, 8, 9]], [[0, 1, 1]])
    """
    # Two converted copies in NumPy: three times faster than one, cut and made contiguous in torch.
    batch = {
        "tokens": torch.from_numpy(rows[:, :-1].astype(np.int64)),
        "targets": torch.from_numpy(rows[:, 1:].astype(np.int64)),
    }
    opens = rows[:, :-1] == end
    opens[:, 0] = False
    if opens.any():
        batch["documents"] = torch.from_numpy(opens.cumsum(axis=1, dtype=np.int32))
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin else batch


def joined(tokens: NDArray[Any] | Joined) -> Joined:
    """Return tokens as a stream of parts."""
    return tokens if isinstance(tokens, Joined) else Joined([tokens])


def validation_batches(
    tokens: NDArray[Any] | Joined,
    *,
    end: int,
    length: int,
    batch: int,
    batches: int | None = None,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Iterator[Batch]:
    """Go through a stream of tokens once, in order, in windows that do not overlap.

    Every token is a target exactly once over all ranks, of which each takes every ``world``-th window. What is missing
    to full windows and full batches has the target -100 and is False in ``real``, booleans that a batch without padding
    does not have. So all ranks get the same number of batches, of the same shape as in training.

    Args:
        tokens: ``(n,)``, ending with ``end``.
        batches: at most so many batches, of windows spread evenly over the stream; None for all.
        end, length, batch, rank, world, pin: as in :class:`Loader`.
    """
    check_shares(batch, rank, world)
    stream = joined(tokens)
    total = -(-len(tokens) // length)
    chosen = np.arange(total)
    if batches is not None:
        integer("batches", batches)
        if batches * batch < total:
            chosen = np.arange(batches * batch) * total // (batches * batch)
    chosen = np.concatenate([chosen, np.full(-len(chosen) % batch, total)])
    # Padding opens no document, which would cost a mask.
    padding = 1 if end == 0 else 0
    for windows in chosen.reshape(-1, batch // world, world)[:, :, rank]:
        at = windows[:, None] * length + np.arange(-1, length)
        rows = stream.rows(at[:, 0] % len(tokens), length + 1).copy()
        rows[at >= len(tokens)] = padding
        rows[at < 0] = end
        result = assemble(rows, end)
        missing = torch.from_numpy(at[:, 1:] >= len(tokens))
        if missing.any():
            result = {**result, "targets": result["targets"].masked_fill(missing, IGNORE), "real": ~missing}
        yield {name: tensor.pin_memory() for name, tensor in result.items()} if pin else result
