"""Is what is called different? ``python -m benchmarks.differential_expression``: simulated truth, real cells halved.

Simulations: 20 sets of 2000 cells, 500 genes, 5 types and 3 batches, in which about half of the genes differ between a
type and the rest (``type_effect=0.2``), or nearly all (1). The truth is whether log2 of the ratio of the true means,
each cell in every batch in turn, is beyond delta. Halves: the cells of one type of a real set, split at random 20
times; whatever is called is false.
"""

import json
import time
from pathlib import Path

import anndata
import numpy as np
from sklearn.metrics import roc_auc_score

import scgen
from benchmarks import protocol
from benchmarks.pairs import commit

DELTA, FDR = 0.25, 0.05
FOLDER = Path(__file__).parent / "results" / "differential_expression"


def true_changes(adata: anndata.AnnData, name: str) -> np.ndarray:
    """Return log2 of the ratio of the mean true shares of a type and of the rest, (G,)."""
    offsets = adata.varm["batch_offset"].T
    alone = np.log(adata.layers["true_scale"]) - offsets[adata.obs["batch"].cat.codes]
    shares = sum(np.exp(one - np.logaddexp.reduce(one, 1, keepdims=True)) for one in (alone + o for o in offsets))
    mine = (adata.obs["cell_type"] == name).to_numpy()
    return np.log2(shares[mine].mean(0) / shares[~mine].mean(0))


def simulation(seed: int, type_effect: float) -> dict:
    adata = scgen.simulate_cells(seed=seed, type_effect=type_effect)
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, seed=seed)
    model.train(seed=seed, progress=False)
    table = model.differential_expression("cell_type", delta=DELTA, fdr_target=FDR, seed=seed)
    rows = []
    for name, one in table.groupby("group1"):
        one = one.loc[adata.var_names]
        lfc = true_changes(adata, name)
        differs, called = np.abs(lfc) > DELTA, one["is_de_fdr_0.05"].to_numpy()
        rows.append(
            {
                "differs": differs.mean(),
                "called": called.mean(),
                "AUROC": roc_auc_score(differs, one["proba_de"]),
                "false discoveries": (called & ~differs).sum() / max(called.sum(), 1),
                "found": (called & differs).sum() / differs.sum(),
                "correlation of fold changes": np.corrcoef(one["lfc_mean"], lfc)[0, 1],
            }
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def halves(name: str, n_types: int = 2) -> dict:
    """Return how many genes are called in each of 20 splits of the cells of the most frequent types."""
    if name in protocol.SETS:
        adata, _, _ = protocol.read(name)
    else:
        adata = anndata.read_h5ad(protocol.DATA / f"{name}.h5ad")
    scgen.setup_anndata(adata, batch_key="batch" if "batch" in adata.obs else None)
    model = scgen.SCVI(adata)
    model.train(progress=False)
    types, found = adata.obs["cell_type"].astype(str), {}
    for kind in types.value_counts().index[:n_types]:
        rows, found[kind] = np.flatnonzero(types == kind), []
        for seed in range(20):
            one, other = np.array_split(np.random.default_rng(seed).permutation(rows), 2)
            table = model.differential_expression(idx1=one, idx2=other, delta=DELTA, fdr_target=FDR, seed=seed)
            found[kind].append(int(table["is_de_fdr_0.05"].sum()))
    return found


def main():
    result = {"commit": commit(), "measured": time.strftime("%Y-%m-%dT%H:%M:%S"), "simulations": {}, "halves": {}}
    for type_effect in (0.2, 1.0):
        runs = [simulation(seed, type_effect) for seed in range(20)]
        result["simulations"][str(type_effect)] = runs
        for key in runs[0]:
            values = [run[key] for run in runs]
            error = np.std(values, ddof=1) / len(values) ** 0.5
            print(f"type_effect {type_effect}: {key} {np.mean(values):.3f}, standard error {error:.3f}", flush=True)
    for name in ("pbmc3k", "kang_ctrl_8donors"):
        result["halves"][name] = halves(name)
        print(name, result["halves"][name], flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{result['commit']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
