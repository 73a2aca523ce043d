"""Scalar approximation theory in NumPy: minimax polynomials, and compositions that drive singular values to 1."""

from danlu.approx.bounds import capacity, geometric_gap, poisson_tail, poisson_tail_bound, series_coefficients
from danlu.approx.budget import budgeted_composition, matrix_products
from danlu.approx.coefficients import TABLES
from danlu.approx.composition import Composition, large_gap_step, optimal_composition, published
from danlu.approx.fit import fit_composition
from danlu.approx.minimax import (
    Certificate,
    ConvergenceWarning,
    ExtendedMinimax,
    Minimax,
    certify,
    max_norm_derivative,
    minimax,
)

__all__ = [
    "TABLES",
    "Certificate",
    "Composition",
    "ConvergenceWarning",
    "ExtendedMinimax",
    "Minimax",
    "budgeted_composition",
    "capacity",
    "certify",
    "fit_composition",
    "geometric_gap",
    "large_gap_step",
    "matrix_products",
    "max_norm_derivative",
    "minimax",
    "optimal_composition",
    "poisson_tail",
    "poisson_tail_bound",
    "published",
    "series_coefficients",
]
