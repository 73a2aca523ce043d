"""Low-rank approximation: from the pseudo-inverse and the SVD to decompositions in a matrix's own columns and rows.

Every decomposition returns a frozen dataclass with ``reconstruct()``, an error estimate and the chosen indices.

>>> import torch
>>> from danlu.linalg.lowrank import cur
>>> M = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0))
>>> f = cur(M, 1, method="cpqr")
>>> f.rows.tolist(), f.columns.tolist(), torch.allclose(f.reconstruct(), M)
([3], [2], True)
"""

from danlu.linalg.lowrank.anncur import Anncur, anncur
from danlu.linalg.lowrank.columns import CHOOSERS, choose_columns
from danlu.linalg.lowrank.cr import CRProduct, cr, cr_variance
from danlu.linalg.lowrank.cur import CUR, cur
from danlu.linalg.lowrank.interpolative import Interpolative, interpolative
from danlu.linalg.lowrank.landmark_attention import landmark_attention, segment_means
from danlu.linalg.lowrank.matrix import ImplicitMatrix
from danlu.linalg.lowrank.nystrom import Nystrom, nystrom
from danlu.linalg.lowrank.pinv import iterative_pinv, least_squares, pinv
from danlu.linalg.lowrank.svd import TruncatedSVD, svd

__all__ = [
    "CHOOSERS",
    "CUR",
    "Anncur",
    "CRProduct",
    "ImplicitMatrix",
    "Interpolative",
    "Nystrom",
    "TruncatedSVD",
    "anncur",
    "choose_columns",
    "cr",
    "cr_variance",
    "cur",
    "interpolative",
    "iterative_pinv",
    "landmark_attention",
    "least_squares",
    "nystrom",
    "pinv",
    "segment_means",
    "svd",
]
