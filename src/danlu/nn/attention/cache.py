"""What a layer remembers of the tokens it has seen: preallocated buffers and a length."""

from collections.abc import Sequence

from torch import Tensor


class LayerCache:
    """Buffers ``(..., capacity, size)`` filled from the left along their next-to-last dimension.

    What they hold is up to the layer: keys and values of each group, or one latent for all heads.

    Args:
        buffers: tensors of equal capacity; nothing is read from them before it was written.

    >>> import torch
    >>> cache = LayerCache(torch.empty(1, 8, 2))
    >>> (seen,) = cache.append(torch.ones(1, 3, 2))
    >>> cache.length, seen.shape
    (3, torch.Size([1, 3, 2]))
    """

    def __init__(self, *buffers: Tensor) -> None:
        capacities = {buffer.shape[-2] for buffer in buffers}
        if len(capacities) != 1:
            raise ValueError(f"buffers must share one capacity, got {sorted(capacities)}")
        self.buffers = buffers
        self.capacity = capacities.pop()
        self.length = 0

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Write ``new`` ``(..., t, size)`` behind what is there; return views of everything so far.

        Raises:
            ValueError: the capacity would be exceeded.
        """
        end = self.length + new[0].shape[-2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} were to be stored")
        for buffer, fresh in zip(self.buffers, new):
            buffer[..., self.length : end, :] = fresh
        self.length = end
        return tuple(buffer[..., :end, :] for buffer in self.buffers)

    def joined(self, others: Sequence["LayerCache"], capacity: int) -> "LayerCache":
        """Return the rows of this cache and of ``others`` in one; shorter ones begin later, behind zeros.

        Args:
            others: caches of the same layer, for other sequences.
            capacity: tokens that there is to be room for.

        >>> import torch
        >>> one, two = (LayerCache(torch.empty(1, n, 1)) for n in (2, 1))
        >>> _ = one.append(torch.ones(1, 2, 1)), two.append(torch.ones(1, 1, 1))
        >>> one.joined([two], 2).buffers[0].flatten(1).tolist()
        [[1.0, 1.0], [0.0, 1.0]]
        """
        caches = (self, *others)
        length = max(cache.length for cache in caches)
        buffers = []
        for parts in zip(*(cache.buffers for cache in caches)):
            like, row = parts[0], 0
            # Zeros: a key that is hidden has weight zero, and zero times what memory happens to hold may be NaN.
            whole = like.new_zeros((sum(len(p) for p in parts), *like.shape[1:-2], capacity, like.shape[-1]))
            for part, cache in zip(parts, caches):
                whole[row : row + len(part), ..., length - cache.length : length, :] = part[..., : cache.length, :]
                row += len(part)
            buffers.append(whole)
        joined = LayerCache(*buffers)
        joined.length = length
        return joined

    def elements_per_token(self) -> int:
        """Cached elements per token of one sequence."""
        return sum(buffer.numel() // (buffer.shape[0] * self.capacity) for buffer in self.buffers)
