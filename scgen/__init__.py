"""scgen: a variational auto-encoder for single-cell counts, for integrating batches in AnnData.

Importing the package loads neither torch nor scanpy; each public name is loaded when it is first used.
"""

import importlib
import warnings
from importlib import metadata

TYPE_CHECKING = False
if TYPE_CHECKING:  # what type checkers and editors see in place of `__getattr__`
    from scgen import plots as plots
    from scgen.analysis.neighborhood_features import neighborhood_features as neighborhood_features
    from scgen.data.registry import check as check
    from scgen.data.registry import setup_anndata as setup_anndata
    from scgen.data.simulate import simulate_cells as simulate_cells
    from scgen.data.tissue import simulate_tissue as simulate_tissue
    from scgen.evaluation.niches import score_niches as score_niches
    from scgen.evaluation.posterior_predictive import PosteriorPredictiveCheck as PosteriorPredictiveCheck
    from scgen.evaluation.posterior_predictive import posterior_predictive_check as posterior_predictive_check
    from scgen.models.matrix_normal import MatrixNormalVAE as MatrixNormalVAE
    from scgen.models.scvi import SCVI as SCVI
    from scgen.models.spatial import SpatialVAE as SpatialVAE
    from scgen.workflows.integration import integrate as integrate
    from scgen.workflows.tuning import PRESETS as PRESETS
    from scgen.workflows.tuning import Tuning as Tuning
    from scgen.workflows.tuning import tune as tune

__version__ = "0.1.0"

_HOME = {
    "MatrixNormalVAE": "models.matrix_normal",
    "PRESETS": "workflows.tuning",
    "PosteriorPredictiveCheck": "evaluation.posterior_predictive",
    "SCVI": "models.scvi",
    "SpatialVAE": "models.spatial",
    "Tuning": "workflows.tuning",
    "check": "data.registry",
    "integrate": "workflows.integration",
    "neighborhood_features": "analysis.neighborhood_features",
    "posterior_predictive_check": "evaluation.posterior_predictive",
    "score_niches": "evaluation.niches",
    "setup_anndata": "data.registry",
    "simulate_cells": "data.simulate",
    "simulate_tissue": "data.tissue",
    "tune": "workflows.tuning",
}
__all__ = sorted(_HOME)

try:
    _other = metadata.version("scgen")
except metadata.PackageNotFoundError:
    pass
else:
    warnings.warn(
        f"the distribution 'scgen' {_other}, another package, is installed too and owns the same import name; the "
        "files of the two overwrite each other. Keep one: pip uninstall scgen scgen-vae, then pip install scgen-vae.",
        stacklevel=2,
    )


def __getattr__(name: str):
    if name == "plots":
        return importlib.import_module("scgen.plots")
    if name not in _HOME:
        raise AttributeError(f"module 'scgen' has no attribute {name!r}; it has: {', '.join([*__all__, 'plots'])}")
    module = importlib.import_module(f"scgen.{_HOME[name]}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__", "plots"]
