"""Distributions with the interface of torch's, without learned parameters."""

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
