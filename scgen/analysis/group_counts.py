"""Statistics of the stored counts of groups of cells: sums, means and standard errors."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy import sparse

from scgen.data.stores import BackedStore, MemoryStore


@dataclass(frozen=True)
class GroupCounts:
    """Number of cells of each group, (K,), and sums over its cells, (K, G).

    Attributes
    ----------
    total, non_zero
        Sum of the counts, and number of non-zero counts.
    share, square
        Sum of the counts divided by their cell's total, and sum of the squares of these shares.
    """

    n_cells: np.ndarray
    total: np.ndarray
    non_zero: np.ndarray
    share: np.ndarray
    square: np.ndarray

    def union(self, groups: Sequence[int]) -> "GroupCounts":
        """Return the statistics of some of the groups."""
        return GroupCounts(*(getattr(self, field.name)[groups] for field in fields(self)))

    def means(self) -> dict[str, np.ndarray]:
        """Return the means over all cells, (G,), for each of the sums."""
        n = self.n_cells.sum()
        return {field.name: getattr(self, field.name).sum(0) / n for field in fields(self)[1:]}

    def relative_error(self) -> np.ndarray:
        """Return the squared relative standard error of each gene's mean share, (G,).

        The groups are strata. The result is at least 1 / (number of counts + 1/2), as for Poisson counts, and at most
        2, for a gene without counts. It is 1 for a group of three cells or fewer, whose variance says nothing.
        """
        n = self.n_cells[:, None].astype(float)
        mean = self.share / n
        degrees = np.maximum(n - 3, 1)  # Student's t: the variance is estimated, too
        variance = np.where(n > 3, np.maximum(self.square - n * mean**2, 0) / degrees, n * mean**2)
        union, error = (n * mean).sum(0), (n * variance).sum(0)
        relative = np.divide(error, union**2, out=np.full(union.shape, 2.0), where=union > 0)
        return np.clip(relative, 1 / (self.total.sum(0) + 0.5), 2)


def counts_of(store: MemoryStore | BackedStore, group: np.ndarray, n_groups: int) -> GroupCounts:
    """Sum the counts of each group; ``group`` has the code of each of the store's cells, -1 for none."""
    sums = np.zeros((4, n_groups, store.shape[1]))
    for start, block in store.blocks():
        x = sparse.csr_matrix(block, dtype=np.float64)
        codes = group[start : start + x.shape[0]]
        rows = np.flatnonzero(codes >= 0)
        members = sparse.csr_matrix((np.ones(len(rows)), (codes[rows], rows)), (n_groups, len(codes)))
        library = np.maximum(np.asarray(x.sum(1)).ravel(), 1)
        share = sparse.diags(1 / library) @ x
        for of, values in zip(sums, (x, x.sign(), share, share.multiply(share)), strict=True):
            of += (members @ values).toarray()
    return GroupCounts(np.bincount(group[group >= 0], minlength=n_groups), *sums)
