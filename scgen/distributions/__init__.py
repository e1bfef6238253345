"""Distributions in torch's protocol, without parameters of their own."""

from scgen.distributions.counts import CellCounts, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from scgen.distributions.flowed import Flowed
from scgen.distributions.gaussian import CorrelatedNormal, DiagonalNormal, PointMass

__all__ = [
    "CellCounts",
    "CorrelatedNormal",
    "DiagonalNormal",
    "Flowed",
    "NegativeBinomial",
    "PointMass",
    "Poisson",
    "ZeroInflatedNegativeBinomial",
]
