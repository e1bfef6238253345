"""Distributions in torch's protocol, without parameters of their own."""

from scgen.distributions.counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from scgen.distributions.gaussian import DiagonalNormal, PointMass

__all__ = ["DiagonalNormal", "NegativeBinomial", "PointMass", "Poisson", "ZeroInflatedNegativeBinomial"]
