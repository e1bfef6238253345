"""Record the cells when all of them are checked, to tell later whether some of them have changed."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from torch import Tensor

from scgen.data.registry import Registry
from scgen.data.stores import BackedStore, MemoryStore, totals_and_squares


@dataclass(frozen=True)
class Snapshot:
    """Names, totals and columns of all cells of an AnnData.

    A method that is called for some cells reads only these, so only these must be unchanged. Models that read
    neighbours, too, ask about all cells.

    Attributes
    ----------
    names
        The names of the N cells.
    sums
        (2, N) float64: the sums of each cell's values and of their squares. The second shows changes that leave the
        first as it is, such as moving one count to another gene.
    columns
        The other fields of `Cells`.
    """

    names: pd.Index
    sums: np.ndarray
    columns: dict[str, Tensor]

    @classmethod
    def of(cls, registry: Registry, adata: AnnData) -> tuple[MemoryStore | BackedStore, "Snapshot"]:
        """Read all cells. Return a store of their values and the snapshot."""
        store = registry.store(adata)
        sums = totals_and_squares(store)
        return store, cls(adata.obs_names, sums, registry.columns(adata, sums[0]))

    def fingerprint(self) -> dict[str, int | str]:
        """Return the number of cells and a hash of their names, totals and columns, in their order.

        Saved models contain it.
        """
        digest = hashlib.sha256("\n".join(self.names).encode())
        for values in (self.sums[0], *(column.numpy() for column in self.columns.values())):
            digest.update((np.round(values, 3) + 0.0).tobytes())  # no -0
        return {"n_cells": len(self.names), "sha256": digest.hexdigest()}

    def holds(
        self, registry: Registry, adata: AnnData, store: MemoryStore | BackedStore, rows: np.ndarray | None
    ) -> bool:
        """Tell whether some cells, or all, have the same names, totals and columns as when they were read."""
        # An index of pandas cannot be changed in place: the same object has the same names.
        if adata.obs_names is not self.names and not adata.obs_names.equals(self.names):
            return False
        sums, rows = totals_and_squares(store, rows), slice(None) if rows is None else rows
        if not _same(sums, self.sums[:, rows]):
            return False
        found = registry.columns(adata, sums[0], rows)
        return all(_same(values.numpy(), self.columns[name][rows].numpy()) for name, values in found.items())


def _same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Tell whether numbers are equal up to rounding errors, which depend on the order of summation."""
    return bool((np.abs(found - expected) <= 5e-4 + 1e-12 * np.abs(expected)).all())
