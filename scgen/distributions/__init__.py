"""Distributions in torch's protocol, without parameters of their own."""

from scgen.distributions.counts import CellCounts, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from scgen.distributions.gaussian import DiagonalNormal, PointMass

__all__ = ["CellCounts", "DiagonalNormal", "NegativeBinomial", "PointMass", "Poisson", "ZeroInflatedNegativeBinomial"]
