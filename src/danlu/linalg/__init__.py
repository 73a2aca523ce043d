"""Functions of matrices on torch tensors: the matrix sign, singular-value clipping, spectral norms, low rank."""

from danlu.linalg.msign import msign, orthogonalize, polar

__all__ = ["msign", "orthogonalize", "polar"]
