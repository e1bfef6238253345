"""What models of scvi-tools' answer here, beside what they answer there: ``python -m benchmarks.imported``.

Differential expression of every cell type against the rest, in pairs of fresh processes: its seconds, the peak memory,
and how its fold changes correlate; then the marginal likelihood, with the standard error of its draws.
"""

import numpy as np
import pandas as pd

from benchmarks import tasks
from benchmarks.pairs import measure

DATA = "kang_ctrl_8donors"


def correlations() -> pd.DataFrame:
    """Return by comparison how log2 of the ratio of the groups' mean scales, and ``lfc_mean``, correlate over genes."""
    ours, theirs = (pd.read_csv(tasks.CACHE / f"differences-{name}-{DATA}.csv") for name in ("scgen", "scvi-tools"))
    rows = {}
    for group in theirs["group1"].unique():
        a, b = (table[table["group1"] == group].set_index("gene") for table in (ours, theirs))
        b = b.loc[a.index]
        ratio = [np.log2(table["scale1"] / table["scale2"]) for table in (a, b)]
        rows[group] = {
            "mean scales": np.corrcoef(*ratio)[0, 1],
            "lfc_mean": np.corrcoef(a["lfc_mean"], b["lfc_mean"])[0, 1],
            "lfc_median": np.corrcoef(a["lfc_median"], b["lfc_median"])[0, 1],
        }
    return pd.DataFrame(rows).T


def marginals(n_cells: int = 300, n_draws: int = 1000, n_repeats: int = 5) -> pd.DataFrame:
    """Return mean and standard error, over repeats, of the marginal likelihood of the same cells by both packages.

    Of scvi-tools' values by cell: its own mean is over minibatches, each of the same weight whatever its size.
    """
    some = np.arange(n_cells)
    asked = {"indices": some, "n_mc_samples": n_draws, "return_mean": False}
    ours, theirs = tasks.imported("scgen", DATA), tasks.imported("scvi-tools", DATA)
    found = {
        "scgen": [ours.get_marginal_ll(**asked, seed=i).mean() for i in range(n_repeats)],
        "scvi-tools": [
            float(theirs.get_marginal_ll(**asked, n_mc_samples_per_pass=50).mean()) for _ in range(n_repeats)
        ],
    }
    return pd.DataFrame(
        {name: {"mean": np.mean(v), "se": np.std(v, ddof=1) / n_repeats**0.5} for name, v in found.items()}
    ).T


if __name__ == "__main__":
    tasks.imported("scgen", DATA)
    measure("differences", DATA)
    print(correlations().round(3).to_string())
    print(marginals().round(3).to_string())
