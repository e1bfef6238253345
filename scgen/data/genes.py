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
    texts = {
        str(name): [value if isinstance(value, str) else "" for value in column]
        for name, column in var.items()
        if not pd.api.types.is_numeric_dtype(column)
    }
    return {name: text for name, text in texts.items() if len(set(text) - {""}) > 0.9 * len(text)}


def matched(
    genes: Sequence[str], gene_ids: Mapping[str, Sequence[str]], adata: AnnData
) -> tuple[list[str | None], str]:
    """Return the name in ``adata.var_names`` of each gene, None where it has none, and by what they were matched.

    The genes' names and each of their identifiers are looked up in ``adata.var_names`` and in each column of
    identifiers in ``adata.var``; the pair that finds most genes is taken, names first, but numbers for names last. What
    is there twice names no gene.
    """
    ours = {"names": genes, **gene_ids}
    theirs = {"adata.var_names": [str(name) for name in adata.var_names]}
    theirs |= {f'adata.var["{key}"]': values for key, values in identifiers(adata.var).items()}
    most, best, by = (0, False), [None] * len(genes), "nothing"
    for where, values in theirs.items():
        place = pd.Series(adata.var_names.astype(str), index=values)
        place = place[~place.index.duplicated(keep=False) & (place.index != "")]
        for kind, names in ours.items():
            once = ~pd.Index(names).duplicated(keep=False)
            found = [
                name if isinstance(name, str) and single else None
                for name, single in zip(place.reindex(names), once, strict=True)
            ]
            n = sum(name is not None for name in found)
            score = n, not all(name.isdigit() for name in names)
            if n and score > most:
                most, best, by = score, found, f"their {kind} in {where}"
    return best, by
