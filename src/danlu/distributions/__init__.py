"""Distributions with the interface of ``torch.distributions``: usable wherever torch's own are."""

from danlu.distributions.fourier import FourierDensity
from danlu.distributions.mapped_fourier import MappedFourierDensity

__all__ = ["FourierDensity", "MappedFourierDensity"]
