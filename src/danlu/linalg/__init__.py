"""Functions of matrices on torch tensors: the matrix sign, singular-value clipping, spectral norms, low rank."""

from danlu.linalg.lowrank import ImplicitMatrix, cr, cur, interpolative, landmark_attention, nystrom, pinv, svd
from danlu.linalg.mclip import mclip, mstep, singular_power, spectral_relu
from danlu.linalg.msign import msign, orthogonalize, polar
from danlu.linalg.spectral import TopSingular, spectral_norm, spectral_norm_gradient

__all__ = [
    "ImplicitMatrix",
    "TopSingular",
    "cr",
    "cur",
    "interpolative",
    "landmark_attention",
    "mclip",
    "msign",
    "mstep",
    "nystrom",
    "orthogonalize",
    "pinv",
    "polar",
    "singular_power",
    "spectral_norm",
    "spectral_norm_gradient",
    "spectral_relu",
    "svd",
]
