"""scgen: a variational auto-encoder for single-cell counts, for integrating batches in AnnData.

Importing the package loads neither torch nor scanpy; each public name is loaded when it is first used.
"""

import importlib
import warnings
from importlib import metadata

__version__ = "0.1.0"

_HOME = {
    "PRESETS": "workflows.tuning",
    "PosteriorPredictiveCheck": "evaluation.posterior_predictive",
    "SCVI": "models.scvi",
    "Tuning": "workflows.tuning",
    "check": "data.registry",
    "integrate": "workflows.integration",
    "posterior_predictive_check": "evaluation.posterior_predictive",
    "setup_anndata": "data.registry",
    "simulate_cells": "data.simulate",
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
