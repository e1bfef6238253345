"""Compare groups of a model's cells: from the arguments of the user to the table."""

import pandas as pd
from anndata import AnnData

from scgen.analysis import comparisons
from scgen.analysis.differential_expression import Settings, as_scanpy, compare
from scgen.arguments import check_flag
from scgen.data.checks import check_types
from scgen.models import loaders


def compared(
    model, settings: Settings, asked: tuple, adata: AnnData | None, batch_correction: bool, key_added: str | None
) -> pd.DataFrame:
    """Return the table of `ExpressionModel.differential_expression`, and write its copy for Scanpy if asked to.

    Parameters
    ----------
    model, adata
        The model, and the cells; None for its own.
    settings
        How to compare.
    asked
        Column, groups and rows, as `comparisons.asked_for` takes them.
    batch_correction, key_added
        As in `ExpressionModel.differential_expression`.
    """
    check_flag("batch_correction", batch_correction)
    if adata is not None:
        check_types(adata, model.registry.setup)
    cells, obs = loaders.annotated(model, adata)
    groupby = asked[0]
    group, found = comparisons.asked_for(obs, *asked)
    comparisons.check_copy(cells, groupby, key_added)
    batches = model.registry.batches_to_average(groupby, batch_correction)
    loader = loaders.of_question(model, adata, None, 1024)
    table = compare(model.vae, loader, model.registry.genes, group, found, batches, settings)
    if key_added is not None:
        cells.uns[key_added] = as_scanpy(table, groupby)
    return table
