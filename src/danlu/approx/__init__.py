"""Scalar approximation theory in NumPy: minimax polynomials, and compositions that drive singular values to 1."""

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
    "certify",
    "minimax",
    "optimal_composition",
    "published",
]
