"""How well cells of a donor that the reference has not seen are mapped: ``kang_ctrl_8donors``, every donor in turn.

    python -m benchmarks.query donors       # each donor mapped, by both packages
    python -m benchmarks.query types        # each cell type held out of training
    python -m benchmarks.query protocols    # cells of another protocol, and each cell type held out of its reference
    python -m benchmarks.query table

A reference of the seven other donors is trained with the package's defaults, but scvi-tools' for 100 epochs, over
which its KL warm-up runs (its own default is 400). The eighth donor's cells are mapped at once, and again after only
what belongs to their batch was trained, scgen's by its default, scvi-tools' for 100 epochs without weight decay.
Labels are transferred from the reference by one rule for both (`scgen.analysis.query.transfer`, without "unknown");
the accuracy is the share of the donor's cells that get their own. Then, of scgen, with a tenth and three tenths of
the genes missing, drawn at random for each donor; and whether the embedding has the same bits with the genes in
another order, with 500 unknown genes more, and with Ensembl ids for names; and the reference's cells after the
training.

``types``: each cell type is held out of the training, with a fifth of the others' cells; both are mapped together,
and the AUROC is by how well `Query.typicality` tells the two apart; beside it, the share of the other types' cells
below .05.

``protocols``: pairs of protocols of ``pbmc_atlas_20batches``, 3,000 cells of one (drawn by the seed) as the reference
and up to 1,500 of another as the query, of types with 20 cells or more in the reference. With all types known: the
share below .05. Then each type that has 20 cells and makes up at most two fifths of the query's is held out of the
reference: the AUROC by how well `Query.typicality` tells its cells from the query's others, and both shares below .05.
Most labels of this set are transferred ones, so that T and NK cells are told apart by other counts of the same kind.
"""

import json
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from benchmarks import pairs, protocol

CACHE = Path(__file__).parent / "cache" / "query"
RESULTS = Path(__file__).parent / "results" / "query"
EPOCHS = 100
#: Trainings of a reference -> what they pass to `train`.
TRAININGS = {"the default": {}, "kl_start=0, batch_penalty=0": {"kl_start": 0.0, "batch_penalty": 0.0}}

#: Name of a pair -> the batches of its reference and of its query. What `Query.typicality` does to a new batch was
#: chosen on the first three, at seed 0.
PROTOCOLS = {
    "10x v3 to pbmc3k": (["pbmc10k", "pbmc5k"], ["pbmc3k"]),
    "pbmc3k to pbmc5k": (["pbmc3k"], ["pbmc5k"]),
    "10x v1 to SCP424": (["pbmc3k", "frozen_donorA"], [f"SCP424_pbmc{i}_{j}" for i in (1, 2) for j in (1, 2)]),
    "pbmc5k and pbmc3k to Kang": (["pbmc5k", "pbmc3k"], ["kang_control"]),
    "pbmc3k and Kang to pbmc10k": (["pbmc3k", "kang_control", "kang_stimulated"], ["pbmc10k"]),
    "pbmc10k to frozen": (["pbmc10k"], ["frozen_donorA"]),
}
REFERENCE_CELLS, QUERY_CELLS, FEWEST, LARGEST_SHARE = 3000, 1500, 20, 0.4


def cells() -> anndata.AnnData:
    return anndata.read_h5ad(protocol.DATA / "kang_ctrl_8donors.h5ad")


def of_scvi_tools(donor: str) -> dict[str, np.ndarray]:
    """Return the embeddings of the reference and, at once and trained, of the donor; they are kept."""
    path = CACHE / f"scvi-tools-{donor}.npz"
    if path.exists():
        return dict(np.load(path))
    import scvi

    adata = cells()
    new = (adata.obs["batch"] == donor).to_numpy()
    reference, query = adata[~new].copy(), adata[new].copy()
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(reference, batch_key="batch")
    model = scvi.model.SCVI(reference)
    silent = {"enable_progress_bar": False, "accelerator": "cpu"}
    model.train(EPOCHS, plan_kwargs={"n_epochs_kl_warmup": EPOCHS}, **silent)
    found = {"reference": model.get_latent_representation()}
    mapped = scvi.model.SCVI.load_query_data(query, model)
    mapped.is_trained_ = True
    found["at_once"] = mapped.get_latent_representation()
    mapped.is_trained_ = False
    mapped.train(EPOCHS, plan_kwargs={"weight_decay": 0.0, "n_epochs_kl_warmup": 1}, **silent)
    found["trained"] = mapped.get_latent_representation()
    CACHE.mkdir(parents=True, exist_ok=True)
    np.savez(path, **found)
    return found


def accuracy(reference: np.ndarray, labels: pd.Series, query: np.ndarray, truth: pd.Series) -> float:
    from scgen.analysis.query import transfer

    found = transfer(reference, labels, query, 15, 0.0)["label"]
    return float((found.to_numpy() == truth.astype(str).to_numpy()).mean())


def reference_of(adata: anndata.AnnData, seed: int, training: str = "the default"):
    import scgen

    reference = adata.copy()
    scgen.setup_anndata(reference, batch_key="batch")
    model = scgen.SCVI(reference, seed=seed)
    model.train(seed=seed, progress=False, **TRAININGS[training])
    return model


def donor_figures(donor: str, seed: int) -> dict[str, float]:
    adata = cells()
    new = (adata.obs["batch"] == donor).to_numpy()
    labels, truth = adata.obs["cell_type"][~new], adata.obs["cell_type"][new]
    theirs = of_scvi_tools(donor)
    found = {
        f"scvi-tools, {name}": accuracy(theirs["reference"], labels, theirs[name.replace(" ", "_")], truth)
        for name in ("at once", "trained")
    }
    for training in TRAININGS:
        model = reference_of(adata[~new], seed, training)
        of_one = mapped_figures(model, adata[new].copy(), labels, truth, seed)
        found |= {f"{training}: {name}": value for name, value in of_one.items()}
    return found


def mapped_figures(model, query: anndata.AnnData, labels: pd.Series, truth: pd.Series, seed: int) -> dict[str, float]:
    z = model.get_latent_representation()

    def mapped(cells: anndata.AnnData) -> np.ndarray:
        return model.query(cells).get_latent_representation()

    at_once = mapped(query)
    found = {"at once": accuracy(z, labels, at_once, truth)}
    rng = np.random.default_rng(seed)
    for share in (0.1, 0.3):
        kept = rng.random(query.n_vars) >= share
        found[f"{share:.0%} of genes missing"] = accuracy(z, labels, mapped(query[:, kept].copy()), truth)
    shuffled = query[:, rng.permutation(query.n_vars)].copy()
    unknown = anndata.AnnData(rng.poisson(1.0, (query.n_obs, 500)).astype(np.float32), obs=query.obs)
    unknown.var_names = [f"unknown_{i}" for i in range(500)]
    more = anndata.concat([query, unknown], axis=1, merge="first")
    more.obs = query.obs
    ensembl = query.copy()
    ensembl.var_names = ensembl.var["ensembl"].astype(str)
    for name, other in (("shuffled", shuffled), ("500 more", more), ("Ensembl", ensembl)):
        found[f"same bits: {name}"] = bool(np.array_equal(mapped(other), at_once))
    tuned = model.query(query)
    tuned.train(progress=False, seed=seed)
    found["trained"] = accuracy(z, labels, tuned.get_latent_representation(), truth)
    again = tuned.model.get_latent_representation(model.adata)
    found["same bits: reference"] = bool(
        np.array_equal(model.get_latent_representation(), z) and np.array_equal(again, z)
    )
    return found


def type_figures(cell_type: str, seed: int) -> dict[str, float]:
    adata, rng = cells(), np.random.default_rng(seed)
    novel = (adata.obs["cell_type"] == cell_type).to_numpy()
    held_out = ~novel & (rng.random(adata.n_obs) < 0.2)
    model = reference_of(adata[~novel & ~held_out], seed)
    table = model.query(adata[novel | held_out].copy()).typicality()["typicality"]
    unseen = novel[novel | held_out]
    return {
        "AUROC": float(roc_auc_score(unseen, -table)),
        "below .05, novel": float((table[unseen] < 0.05).mean()),
        "below .05, known": float((table[~unseen] < 0.05).mean()),
    }


def protocol_sets(pair: str, seed: int) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Return cells of the reference's and of the query's protocol, of types that both have."""
    adata, rng = anndata.read_h5ad(protocol.DATA / "pbmc_atlas_20batches.h5ad"), np.random.default_rng(seed)
    adata = adata[adata.obs["cell_type"] != "unassigned"].copy()
    for column in ("batch", "cell_type"):
        adata.obs[column] = adata.obs[column].astype(str)
    reference, query = (
        adata[np.sort(rng.permutation(np.flatnonzero(adata.obs["batch"].isin(batches)))[:most])].copy()
        for batches, most in zip(PROTOCOLS[pair], (REFERENCE_CELLS, QUERY_CELLS), strict=True)
    )
    known = reference.obs["cell_type"].value_counts()
    return reference, query[query.obs["cell_type"].isin(known.index[known >= FEWEST])].copy()


def protocol_figures(pair: str, seed: int) -> dict[str, float]:
    reference, query = protocol_sets(pair, seed)
    table = reference_of(reference, seed).query(query).typicality()
    found = {"all known: below .05": float((table["typicality"] < 0.05).mean())}
    n = query.obs["cell_type"].value_counts()
    for cell_type in sorted(n.index[(n >= FEWEST) & (n <= LARGEST_SHARE * len(query))]):
        model = reference_of(reference[reference.obs["cell_type"] != cell_type], seed)
        typicality, novel = model.query(query).typicality()["typicality"], (query.obs["cell_type"] == cell_type)
        found[f"{cell_type}: AUROC"] = float(roc_auc_score(novel, -typicality))
        found[f"{cell_type}: share of the query"] = float(novel.mean())
        found[f"{cell_type}: below .05"] = float((typicality[novel] < 0.05).mean())
        found[f"{cell_type}: known below .05"] = float((typicality[~novel] < 0.05).mean())
    return found


def protocol_table() -> pd.DataFrame:
    """Return one row for each pair, seed, and held-out type (none: all are known)."""
    rows = []
    for path in sorted(RESULTS.glob("protocols-*.json")):
        one = json.loads(path.read_text())
        by_type: dict[str, dict] = {}
        for name, value in one["figures"].items():
            cell_type, figure = name.split(": ")
            by_type.setdefault(cell_type, {})[figure] = value
        rows += [{"pair": one["what"], "seed": one["seed"], "held out": name} | of for name, of in by_type.items()]
    return pd.DataFrame(rows).sort_values(["pair", "held out", "seed"]).set_index(["pair", "held out", "seed"])


def table(kind: str) -> pd.DataFrame:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{kind}-*.json"))]
    return pd.DataFrame([one["figures"] for one in found], index=[(one["what"], one["seed"]) for one in found])


if __name__ == "__main__":
    kind, seeds = sys.argv[1], [int(seed) for seed in sys.argv[2:]] or [0]
    if kind == "table":
        for kind in ("donors", "types"):
            shown = table(kind)
            print(
                shown.round(3).to_string(), "\n", shown.astype(float).agg(["mean", "median"]).round(4).to_string(), "\n"
            )
        shown = protocol_table()
        means = shown.groupby(level=["pair", "held out"]).agg(["mean", "std"])
        print(means.round(3).to_string())
        sys.exit()
    commit = pairs.commit()
    names, figures = {
        "donors": (lambda: sorted(cells().obs["batch"].unique()), donor_figures),
        "types": (lambda: sorted(cells().obs["cell_type"].unique()), type_figures),
        "protocols": (lambda: list(PROTOCOLS), protocol_figures),
    }[kind]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for what in names():
            result = {"what": what, "seed": seed, "commit": commit, "figures": figures(what, seed)}
            print(json.dumps(result), flush=True)
            name = f"{kind}-{what.replace(' ', '_')}-{seed}.json"
            (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
