"""Functions of matrices on torch tensors: the matrix sign, singular-value clipping, spectral norms, low rank."""

from danlu.linalg.lowrank import ImplicitMatrix, cr, cur, interpolative, landmark_attention, nystrom, pinv, svd
from danlu.linalg.msign import msign, orthogonalize, polar

__all__ = [
    "ImplicitMatrix",
    "cr",
    "cur",
    "interpolative",
    "landmark_attention",
    "msign",
    "nystrom",
    "orthogonalize",
    "pinv",
    "polar",
    "svd",
]
