"""Which genes of one AnnData are those of another, by name or by an identifier that both have."""

from collections.abc import Mapping, Sequence

import pandas as pd
from anndata import AnnData


def identifiers(var: pd.DataFrame) -> dict[str, list[str]]:
    """Return the columns of ``adata.var`` that name genes: text, hardly any of it twice.

    Examples
    --------
    >>> var = pd.DataFrame({"ensembl": ["ENSG1", "ENSG2"], "kind": ["coding", "coding"], "length": [3, 4]})
    >>> identifiers(var)
    {'ensembl': ['ENSG1', 'ENSG2']}
    """
    columns = {str(name): column for name, column in var.items() if not pd.api.types.is_numeric_dtype(column)}
    texts = {name: ["" if pd.isna(value) else str(value) for value in column] for name, column in columns.items()}
    return {name: text for name, text in texts.items() if len(set(text) - {""}) > 0.9 * len(text)}


def matched(
    genes: Sequence[str], gene_ids: Mapping[str, Sequence[str]], adata: AnnData
) -> tuple[list[str | None], str]:
    """Return the name in ``adata.var_names`` of each gene, None where it has none, and by what they were matched.

    The genes' names and each of their identifiers are looked up in ``adata.var_names`` and in each column of
    identifiers in ``adata.var``; the pair that finds most genes is taken, names first.
    """
    ours = {"names": genes, **gene_ids}
    theirs = {"adata.var_names": [str(name) for name in adata.var_names]}
    theirs |= {f'adata.var["{key}"]': values for key, values in identifiers(adata.var).items()}
    best, by = [None] * len(genes), "nothing"
    for where, values in theirs.items():
        place = pd.Series(adata.var_names.astype(str), index=values)
        place = place[~place.index.duplicated(keep=False) & (place.index != "")]
        for kind, names in ours.items():
            found = [name if isinstance(name, str) else None for name in place.reindex(names)]
            if sum(name is not None for name in found) > sum(name is not None for name in best):
                best, by = found, f"their {kind} in {where}"
    return best, by
