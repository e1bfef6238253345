"""Describe models and queries on one line, on several lines, and as a table for notebooks.

The method `_summary` of a class returns what is shown: a title, and rows of a name and a text.
"""

import inspect
from dataclasses import asdict
from html import escape

import numpy as np

from scgen.arguments import counted
from scgen.data.categories import codes_of_column
from scgen.data.checks import some


def line(self) -> str:
    """Return the summary on one line, as `repr` shows it."""
    title, rows = self._summary()
    return "; ".join([title, *(f"{name}: {told}" for name, told in rows.items())])


def text(self) -> str:
    """Return the summary on a line for each row, as `print` shows it."""
    title, rows = self._summary()
    return "\n".join([title, *(f"    {name}: {told}" for name, told in rows.items())])


def table(self) -> str:
    """Return the summary as HTML, as notebooks show it."""
    title, rows = self._summary()
    # Escaped, since a batch may have any name.
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(told)}</td></tr>" for name, told in rows.items())
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"


def of_model(model) -> tuple[str, dict[str, str]]:
    """Return the title and the rows of a model."""
    registry = model.registry
    defaults = {name: of.default for name, of in inspect.signature(type(model)).parameters.items()}
    changed = [f"{name}={value!r}" for name, value in asdict(model.arguments).items() if value != defaults.get(name)]
    cells = "no cells" if model.adata is None else counted(model.adata.n_obs, "cell")
    rows = {"arguments": ", ".join(changed) or "the defaults", "training": of_training(model)}
    if registry.setup.batch_key is not None:
        rows = {"batches": f"{len(registry.batches):,} ({some(registry.batches, 3)})", **rows}
    of = "" if registry.setup.use_rep is None else f" of {registry.setup.where}"
    return f"{type(model).__name__} model of {cells} x {registry.counted_features}{of}", rows


def of_training(model) -> str:
    """Return how long a model was trained, and how good it became."""
    if not model.is_trained:
        return "none"
    history, last = model.history, model.trainings[-1]
    if history.empty:
        return f"by {last['trained_by']}" if "trained_by" in last else "done, without a history"
    told = counted(len(history), "epoch")
    if "seconds" in history:
        seconds = history["seconds"].sum()
        told += f" in {seconds:.0f} s" if seconds < 60 else f" in {seconds / 60:.1f} min"
    if "elbo_validation" in history:
        bound = "ELBO" if last.get("n_importance_samples", 1) == 1 else "importance-weighted bound"
        told += f", best validation {bound} {history['elbo_validation'].max():.1f} nats per {model._unit}"
    return told + (", interrupted" if last.get("finished") is False else "")


def of_query(query) -> tuple[str, dict[str, str]]:
    """Return the title and the rows of a query."""
    registry, cells = query.model.registry, query.model.adata
    n = len(registry.genes)
    what = "genes" if registry.setup.use_rep is None else "columns"
    rows = {what: f"{n:,} of {n + len(registry.missing):,} ({query.overlap:.0%}), by {query.matched_by}"}
    rows |= {f"new in {key}": some(registry.categories[key][known:]) for key, known in registry.known.items()}
    key = registry.setup.batch_key
    if key in cells.obs:  # a user may have removed it since
        known = registry.batches[: registry.known.get(key)]
        codes = np.unique(codes_of_column(cells.obs[key], known))
        there = sorted(known[code] for code in codes if code >= 0)
        rows |= {f"taken for the reference's own in {key}": some(there)} if there else {}
    if not query.model.history.empty:
        rows["training"] = of_training(query.model)
    return f"Query of {counted(cells.n_obs, 'cell')}", rows
