"""Distributions in torch's protocol, without parameters of their own."""

from scgen.distributions.counts import CellCounts, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from scgen.distributions.flow import FlowDistribution
from scgen.distributions.gaussian import DiagonalNormal, GaussianMixture, PointMass, SeededNormal

__all__ = [
    "CellCounts",
    "DiagonalNormal",
    "FlowDistribution",
    "GaussianMixture",
    "NegativeBinomial",
    "PointMass",
    "Poisson",
    "SeededNormal",
    "ZeroInflatedNegativeBinomial",
]
