"""Match the genes of two AnnData, by name or by an identifier that both have."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

#: Identifiers of Ensembl and RefSeq that end in a version. Clone names such as RP11-34P13.7 also end in a number, but
#: there a different number is a different gene.
VERSIONED = re.compile(r"((?:ENS[A-Z]*\d{6,})|(?:[NX][MR]_\d{6,}))\.\d+")


def identifiers(var: pd.DataFrame) -> dict[str, list[str]]:
    """Return the columns of ``adata.var`` that identify genes: text, with hardly any duplicates.

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


def without_version(name: str) -> str:
    """Return an identifier of Ensembl or RefSeq without its version, and any other name unchanged.

    Examples
    --------
    >>> [without_version(name) for name in ("ENSG00000012048.12", "ENSMUSG00000017167", "RP11-34P13.7", "NM_000014.6")]
    ['ENSG00000012048', 'ENSMUSG00000017167', 'RP11-34P13.7', 'NM_000014']
    """
    found = VERSIONED.fullmatch(name)
    return found[1] if found else name


def places_of(genes: Sequence[str], names: pd.Index) -> tuple[np.ndarray, int]:
    """Return the position of each gene in unique ``names``, (G,), or -1; and how many match only without a version.

    Versions are ignored only if the name without version is unique on both sides.
    """
    places = names.get_indexer(pd.Index(genes))
    if (places >= 0).all():
        return places, 0
    ours, theirs = (pd.Index([without_version(str(name)) for name in which]) for which in (genes, names))
    once = pd.Series(np.arange(len(theirs)), index=theirs)[~theirs.duplicated(keep=False)]
    unversioned = once.reindex(ours, fill_value=-1).to_numpy()
    found = (places < 0) & (unversioned >= 0) & ~ours.duplicated(keep=False)
    return np.where(found, unversioned, places), int(found.sum())


def matched(
    genes: Sequence[str], gene_ids: Mapping[str, Sequence[str]], adata: AnnData
) -> tuple[list[str | None], str]:
    """Return the name of each gene in ``adata.var_names``, or None, and a text that says what was matched.

    The genes' names and each column of their identifiers are looked up in ``adata.var_names`` and in each column of
    identifiers in ``adata.var``. The pair that matches most genes is used. Ties prefer names, and names that are only
    numbers come last. Duplicates match no gene. Versions are ignored if this matches more genes.
    """
    ours = {"names": genes, **gene_ids}
    theirs = {"adata.var_names": [str(name) for name in adata.var_names]}
    theirs |= {f'adata.var["{key}"]': values for key, values in identifiers(adata.var).items()}
    # Unchanged names come first: ignoring versions must match more genes.
    forms = {"": str, ", without their versions": without_version}
    most, best, by = (0, False), [None] * len(genes), "nothing"
    for note, form in forms.items():
        if most[0] == len(genes):
            break
        for where, values in theirs.items():
            place = pd.Series(adata.var_names.astype(str), index=[form(value) for value in values])
            place = place[~place.index.duplicated(keep=False) & (place.index != "")]
            for kind, names in ours.items():
                asked = pd.Index([form(name) for name in names])
                once = ~asked.duplicated(keep=False)
                found = [
                    name if isinstance(name, str) and single else None
                    for name, single in zip(place.reindex(asked), once, strict=True)
                ]
                n = sum(name is not None for name in found)
                score = n, not all(name.isdigit() for name in names)
                if n and score > most:
                    most, best, by = score, found, f"their {kind} in {where}{note}"
    return best, by
