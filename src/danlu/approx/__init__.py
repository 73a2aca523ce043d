"""Scalar approximation theory in NumPy: minimax polynomials, and compositions that drive singular values to 1."""

from danlu.approx.bounds import capacity, geometric_gap, poisson_tail, poisson_tail_bound, series_coefficients
from danlu.approx.coefficients import TABLES
from danlu.approx.composition import Composition, optimal_composition, published
from danlu.approx.minimax import Certificate, ConvergenceError, ExtendedMinimax, Minimax, certify, minimax

__all__ = [
    "TABLES",
    "Certificate",
    "Composition",
    "ConvergenceError",
    "ExtendedMinimax",
    "Minimax",
    "capacity",
    "certify",
    "geometric_gap",
    "minimax",
    "optimal_composition",
    "poisson_tail",
    "poisson_tail_bound",
    "published",
    "series_coefficients",
]
