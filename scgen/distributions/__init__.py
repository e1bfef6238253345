"""Distributions with the interface of torch's, without learned parameters."""

from scgen.distributions.circular import CircularUniform, WrappedNormal
from scgen.distributions.counts import CellCounts, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from scgen.distributions.flow import FlowDistribution
from scgen.distributions.gaussian import DiagonalNormal, GaussianMixture, PointMass, SeededNormal
from scgen.distributions.matrix_normal import MatrixNormal
from scgen.distributions.niches import CellsOfNiches

__all__ = [
    "CellCounts",
    "CellsOfNiches",
    "CircularUniform",
    "DiagonalNormal",
    "FlowDistribution",
    "GaussianMixture",
    "MatrixNormal",
    "NegativeBinomial",
    "PointMass",
    "Poisson",
    "SeededNormal",
    "WrappedNormal",
    "ZeroInflatedNegativeBinomial",
]
