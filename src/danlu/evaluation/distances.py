r"""Measures of generated against real examples by feature vectors: distances, precision and recall, and copies.

With the features of an Inception network the Frechet distance is the FID and the kernel distance the KID of papers;
with another network the values differ and only compare models that were measured with the same network.
"""

import torch
from torch import Tensor

from danlu._validate import integer, number


def frechet_distance(first_nd: Tensor, second_md: Tensor) -> float:
    r"""Squared Frechet distance between the normal distributions fitted to two sets of vectors.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))`` (Dowson and Landau 1982; Heusel et al.,
    arXiv 1706.08500), in float64, exact also for singular covariances. It is biased upwards for small sets: compare
    sets of equal sizes.

    Args:
        first_nd: ``(n, d)``.
        second_md: ``(m, d)``.

    Raises:
        ValueError: other shapes, fewer than two vectors, or values that are not finite.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> frechet_distance(x, 2 * x + 1)
    6.0
    """
    first, second = _checked("first", first_nd, 2), _checked("second", second_md, 2, first_nd.shape[-1])
    left, right = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (first, second))
    values, vectors = torch.linalg.eigh(left)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    inner = root @ right @ root
    cross = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp_min(0).sqrt().sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    return round(float(means + left.trace() + right.trace() - 2 * cross), 12)


def kernel_distance(first_nd: Tensor, second_md: Tensor) -> float:
    r"""Unbiased estimate of the squared maximum mean discrepancy under the kernel ``(x . y / d + 1)^3``.

    Its expectation is 0 for two sets of one distribution, whatever their sizes, so it can be negative (Gretton et al.
    2012, lemma 6; used as the KID in Binkowski et al., arXiv 1801.01401).

    Args:
        first_nd: ``(n, d)``.
        second_md: ``(m, d)``.

    Raises:
        ValueError: as :func:`frechet_distance`.
    """
    x, y = _checked("first", first_nd, 2), _checked("second", second_md, 2, first_nd.shape[-1])

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / a.shape[1] + 1) ** 3

    def among(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return float(among(x) + among(y) - 2 * kernel(x, y).mean())


def precision_recall(generated_nd: Tensor, real_md: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Share of generated vectors among the real ones, and of real vectors among the generated ones.

    A vector is among a set if its distance to some member is at most that member's distance to its ``neighbours``-th
    nearest other member (Kynkaanniemi et al., arXiv 1904.06991). Bad images lower precision, missing modes lower
    recall.

    Args:
        generated_nd: ``(n, d)``.
        real_md: ``(m, d)``.
        neighbours: at least 1 and smaller than either set.

    Raises:
        ValueError: as :func:`frechet_distance`, or ``neighbours`` out of range.
    """
    generated = _checked("generated", generated_nd, 2)
    real = _checked("real", real_md, 2, generated.shape[1])
    integer("neighbours", neighbours, high=min(len(generated), len(real)) - 1)

    def covered(points: Tensor, members: Tensor) -> float:
        # The nearest member of each member is itself.
        radius = torch.cdist(members, members).kthvalue(neighbours + 1, dim=1).values
        return float((torch.cdist(points, members) <= radius).any(1).double().mean())

    return covered(generated, real), covered(real, generated)


def nearest_distances(points_nd: Tensor, members_md: Tensor) -> Tensor:
    """Distance of each point ``(n, d)`` to the nearest of the members ``(m, d)``, float64 ``(n,)``."""
    points = _checked("points", points_nd, 1)
    members = _checked("members", members_md, 1, points.shape[1])
    return torch.cat([torch.cdist(part, members).amin(1) for part in points.split(512)])


def copied_share(generated_nd: Tensor, train_md: Tensor, held_out_kd: Tensor, *, quantile: float = 0.01) -> float:
    """Share of generated vectors nearer to a training vector than all but ``quantile`` of the held-out vectors are.

    It is near ``quantile`` for a generator of new examples and near 1 for one that repeats its training set.

    Args:
        generated_nd, train_md, held_out_kd: ``(., d)``, usually the pixels themselves.
        quantile: between 0 and 1.

    Raises:
        ValueError: as :func:`frechet_distance`.
    """
    number("quantile", quantile, low=0, high=1)
    threshold = torch.quantile(nearest_distances(held_out_kd, train_md), quantile)
    return float((nearest_distances(generated_nd, train_md) < threshold).double().mean())


def _checked(name: str, vectors: Tensor, least: int, size: int | None = None) -> Tensor:
    if vectors.dim() != 2 or len(vectors) < least or (size is not None and vectors.shape[1] != size):
        wanted = f"(at least {least}, {'d' if size is None else size})"
        raise ValueError(f"{name} must be vectors {wanted}, got shape {tuple(vectors.shape)}")
    vectors = vectors.detach().double()
    if not torch.isfinite(vectors).all():
        raise ValueError(f"{name} holds values that are not finite")
    return vectors
