"""Scalar approximation theory in NumPy: minimax polynomials, and compositions that drive singular values to 1."""

from danlu.approx.coefficients import TABLES
from danlu.approx.composition import Composition, optimal_composition, published

__all__ = ["TABLES", "Composition", "optimal_composition", "published"]
