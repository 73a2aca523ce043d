r"""Quanta from gradients: which samples ask for the same change (Michaud et al., arXiv 2303.13506, section 5).

The gradients of samples that use one quantum point the same way. What is compared is the angle between them,
``1 - arccos(cos) / pi``: 1 for the same direction, 1/2 for a right angle, 0 for opposite ones. Clusters of this
similarity, by `sklearn.cluster.SpectralClustering(affinity="precomputed")`, are the paper's quanta.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["angular_similarity", "sample_gradients"]


def sample_gradients(
    loss: Callable[..., Tensor], parameters: Mapping[str, Tensor], *samples: Tensor, chunk: int | None = None
) -> Tensor:
    """Return the gradient of the loss of each sample, ``(samples, numbers)``.

    Args:
        loss: ``loss(parameters, *sample)``, a scalar, of one sample (`torch.func.functional_call` for a module).
        parameters: by name, those whose gradients count: the paper leaves out embeddings, head and norms.
        samples: tensors whose first dimension counts the samples.
        chunk: samples at a time; None for all.

    >>> x, y = torch.eye(2), torch.tensor([1.0, 2.0])
    >>> sample_gradients(lambda p, x, y: (p["w"] @ x - y).square() / 2, {"w": torch.zeros(2)}, x, y).tolist()
    [[-1.0, -0.0], [-0.0, -2.0]]
    """
    taken = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *(0 for _ in samples)), chunk_size=chunk)
    found = taken(dict(parameters), *samples)
    return torch.cat([found[name].flatten(1) for name in parameters], dim=1)


def angular_similarity(gradients: Tensor) -> Tensor:
    """Return ``1 - arccos(c) / pi`` of the cosines between rows, ``(n, n)``: symmetric, with ones on the diagonal.

    A row of zeros has no direction and is at a right angle to every other.

    Args:
        gradients: ``(n, numbers)``.

    Raises:
        ValueError: ``gradients`` has not two dimensions.

    >>> angular_similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]))[0].tolist()
    [1.0, 0.5, 0.0]
    """
    if gradients.dim() != 2:
        raise ValueError(f"gradients must be (samples, numbers), got shape {tuple(gradients.shape)}")
    unit = torch.nn.functional.normalize(gradients, dim=1, eps=torch.finfo(gradients.dtype).tiny)
    # Rounding may leave [-1, 1], outside of which there is no angle.
    similarity = 1 - torch.acos((unit @ unit.T).clamp(-1, 1)) / math.pi
    return similarity.fill_diagonal_(1.0)
