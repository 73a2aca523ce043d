"""Distributions in the form of ``torch.distributions``: usable wherever torch's own are."""

from danlu.distributions.fourier import FourierDensity, MappedFourierDensity

__all__ = ["FourierDensity", "MappedFourierDensity"]
