"""How well niches of real tissue are told apart, and what changes if the tissue is turned or cells are missing.

    python -m benchmarks.real_niches starmap [SEED ...] [--values counts pca scvi] [--n-latent N] [--epochs N]
    python -m benchmarks.real_niches osmfish [SEED ...] ...
    python -m benchmarks.real_niches her2st [SEED ...] ...
    python -m benchmarks.real_niches invariance [SEED ...] [--values shells8 shells20 simulated]
    python -m benchmarks.real_niches table

Each seed and each kind of values is one training of a `SpatialVAE`, without labels, and one line of JSON. The values
are the counts (of all genes; of `her2st` the 300 most variable), 30 principal components of the log-normalised counts
of all genes, or the latents of an `SCVI` with the section as batch. Beside the model are the baselines of
`scgen.neighborhood_features` on the same values (log-normalised counts in place of counts), for the same neighbours.

- `starmap`: layers of cortex, as `layers` derives them. Each of the three sections is predicted from the two others, by
  `scgen.score_niches`. 18 neighbours.
- `osmfish`: regions as annotated; cells without a region are neighbours, but are not scored. The file has 527 cells
  twice; one of each is kept. The only section is divided into blocks, and a tenth of the blocks is predicted from the
  others (`score_blocks`). 18 neighbours.
- `her2st`: regions as annotated by a pathologist, without "undetermined". A fifth of the blocks of a section is
  predicted from the other blocks of this section. Whole shells of the grid: the 8 spots around each. Spots without any
  count of the variable genes are left out.
- `invariance`: how much z and theta change if each section is turned by a random angle and neighbours are looked for
  anew; if a tenth of the neighbours of each cell is left out; and if a tenth of the cells is left out and neighbours
  are looked for anew. On `her2st` (components, shells of 8 or 20 spots) and on `scgen.simulate_tissue`. "certain half":
  the half of the cells of which the standard deviation of q(theta) is smallest.

Seconds are those of the training, on the machine as it was.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scgen
from benchmarks.niches import RESULTS, spread
from scgen.data.neighbourhoods import Neighbourhoods

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = {"starmap": "starmap_mpfc", "osmfish": "osmfish_ssctx", "her2st": "her2st_spatial_8sections"}
NEIGHBORS = {"starmap": 18, "osmfish": 18, "her2st": 8, "shells8": 8, "shells20": 20, "simulated": 18}
#: Side of a block in the unit of the coordinates, about four times the radius of a neighbourhood, and number of folds.
BLOCKS = {"osmfish": (5000.0, 10), "her2st": (6.0, 5)}
VALUES = ("counts", "pca", "scvi")
INVARIANCE = ("shells8", "shells20", "simulated")
METHODS = ("mean", "gradient", "pool")
SCORES = ["knn_accuracy", "knn_accuracy_scaled", "logistic_accuracy"]


def read(setting: str, folder: Path) -> anndata.AnnData:
    """Return the cells, with the section in ``obs["section"]`` and what is predicted in ``obs["niche"]``, or NaN."""
    adata = anndata.read_h5ad(folder / f"{FILES[setting]}.h5ad")
    if setting == "starmap":
        adata.obs["section"], adata.obs["niche"] = adata.obs["batch"], layers(adata)
    elif setting == "osmfish":
        adata = adata[~pd.DataFrame(adata.obsm["spatial"]).duplicated().to_numpy()].copy()
        adata.obs["section"] = pd.Categorical(["section"] * adata.n_obs)
        adata.obs["niche"] = adata.obs["region"].where(adata.obs["region"] != "Excluded")
    else:
        adata.obs["section"] = adata.obs["batch"]
        adata.obs["niche"] = adata.obs["cell_type"].where(adata.obs["cell_type"] != "undetermined")
    adata.obs["niche"] = adata.obs["niche"].astype("category").cat.remove_unused_categories()
    return adata


def layers(adata: anndata.AnnData) -> pd.Series:
    """Return the layer of each cell, by its depth among the excitatory cells of its section.

    The types of excitatory cells are named by their layer, such as "eL5-3". Depth is the linear function of the
    position that predicts the layer's rank best, by least squares over the excitatory cells of the section. Layers are
    bands of depth, with the boundaries that leave the fewest excitatory cells outside the band of their own layer. All
    cells of a band, of whatever type, have its layer.
    """
    named = adata.obs["cell_type"].astype(str).str.extract(r"^e?(L[\d/]+)", expand=False)
    names = np.sort(named.dropna().unique())
    found = pd.Series(index=adata.obs_names, dtype=object)
    for section in adata.obs["batch"].cat.categories:
        rows = (adata.obs["batch"] == section).to_numpy()
        design = np.column_stack([adata.obsm["spatial"][rows], np.ones(rows.sum())])
        known = named[rows].notna().to_numpy()
        layer = np.searchsorted(names, named[rows][known])
        depth = design @ np.linalg.lstsq(design[known], layer, rcond=None)[0]
        order = np.argsort(depth[known])
        above = np.cumsum(np.eye(len(names))[layer[order]], axis=0)  # cells of each layer down to each depth
        last = [np.argmax(above[:, i] - above[:, i + 1]) for i in range(len(names) - 1)]
        boundaries = [depth[known][order][i : i + 2].mean() for i in last]
        found[rows] = names[np.searchsorted(boundaries, depth)]
    inside = (found == named)[named.notna()].mean()
    print(f"{inside:.3f} of the excitatory cells are in the band of their layer", found.value_counts().to_dict())
    return found


def described(adata: anndata.AnnData, values: str, seed: int, device: str) -> np.ndarray:
    """Return the values of the cells that the baselines, and the model but for counts, read."""
    if values == "scvi":
        scgen.setup_anndata(adata, batch_key="section" if adata.obs["section"].nunique() > 1 else None)
        model = scgen.SCVI(adata, seed=seed)
        model.train(seed=seed, accelerator=device, progress=False)
        return model.get_latent_representation()
    if values == "counts":
        return normalised(adata).X.toarray()
    return sc.pp.pca(normalised(adata).X, n_comps=30, random_state=0).astype(np.float32)


def normalised(adata: anndata.AnnData) -> anndata.AnnData:
    """Return log-normalised counts."""
    copy = adata.copy()
    sc.pp.normalize_total(copy)
    sc.pp.log1p(copy)
    return copy


def trained(adata, setting: str, values: str, seed: int, args) -> tuple[scgen.SpatialVAE, dict]:
    """Return a model trained on the counts or on ``obsm["values"]``, and what is told of its training."""
    batch_key = "section" if adata.obs["section"].nunique() > 1 else None
    scgen.setup_anndata(adata, spatial_key="spatial", batch_key=batch_key, counts=values != "simulated")
    started = time.perf_counter()
    use_rep = None if values in ("counts", "simulated") else "values"
    sizes = {"n_latent": args.n_latent, "n_neighbors": NEIGHBORS[setting]}
    model = scgen.SpatialVAE(adata, use_rep=use_rep, **sizes, rotate=not args.without_places, seed=seed)
    if args.without_places:
        change_sources(model, offsets=torch.zeros_like)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train(args.epochs, seed=seed, accelerator=args.device, progress=False)
    return model, {
        "seconds": time.perf_counter() - started,
        "epochs": len(model.history),
        "kept_epoch": int(model.history["elbo_validation"].idxmax()),
        "kl": model.history.filter(like="kl_").iloc[-1].to_dict(),
        "active": int(model.active_units()["active"].sum()),
        "warnings": [str(warning.message)[:200] for warning in caught],
    }


def niches(setting: str, values: str, seed: int, args) -> dict:
    """Return the scores of a model and of the baselines on the same values."""
    adata = read(setting, args.data)
    if setting == "her2st" and values == "counts":
        chosen = sc.pp.highly_variable_genes(normalised(adata), n_top_genes=300, batch_key="section", inplace=False)
        adata = adata[:, chosen["highly_variable"].to_numpy()].copy()
        sc.pp.filter_cells(adata, min_counts=1)
    adata.obsm["values"] = described(adata, values, seed, args.device)
    model, told = trained(adata, setting, values, seed, args)
    near = {"section_key": "section", "n_neighbors": NEIGHBORS[setting]}
    found = {"SpatialVAE": model.get_latent_representation()}
    found |= {name: scgen.neighborhood_features(adata, name, use_rep="values", **near) for name in METHODS}
    found["cell alone"] = adata.obsm["values"]
    if setting != "her2st":  # its spots have no types but the regions
        found["composition"] = scgen.neighborhood_features(adata, "composition", labels_key="cell_type", **near)
    if setting == "starmap":
        scores = scgen.score_niches(adata, "niche", found, section_key="section").to_dict("index")
    else:
        scores = score_blocks(adata, found, setting)
    scored = adata[adata.obs["niche"].notna()].obs
    return {"scores": scores, "majority": majority(scored, setting)} | told


def majority(scored: pd.DataFrame, setting: str) -> float:
    """Return the share of the largest niche, of `her2st` in each section."""
    groups = scored.groupby("section", observed=True)["niche"] if setting == "her2st" else [("all", scored["niche"])]
    return float(sum(niche.value_counts().max() for _, niche in groups) / len(scored))


def score_blocks(adata: anndata.AnnData, found: dict[str, np.ndarray], setting: str) -> dict[str, dict[str, float]]:
    """Return accuracies of the cells of each fold of blocks, predicted from other blocks of the same section.

    Cells whose neighbourhood shares a cell with that of a predicted cell are not used for the prediction.
    """
    side, n_folds = BLOCKS[setting]
    sections, niche = adata.obs["section"].cat.codes.to_numpy(), adata.obs["niche"].cat.codes.to_numpy()
    places = adata.obsm["spatial"]
    near = Neighbourhoods.of(places, sections, n_neighbors=NEIGHBORS[setting]).index
    column, row = ((places - places.min(0)) // side).astype(int).T
    # Blocks of one fold do not touch each other.
    fold = (column + 3 * row) % n_folds
    knn, logistic = KNeighborsClassifier(15), LogisticRegression(max_iter=1000)
    scaled = {"knn_accuracy_scaled": knn, "logistic_accuracy": logistic}
    classifiers = {"knn_accuracy": knn} | {name: make_pipeline(StandardScaler(), of) for name, of in scaled.items()}
    right = {name: dict.fromkeys(classifiers, 0) for name in found}
    for section in np.unique(sections):
        for out in range(n_folds):
            test = (sections == section) & (fold == out) & (niche >= 0)
            if not test.any():
                continue
            read = np.zeros(adata.n_obs, bool)
            read[near[test]] = True
            train = (sections == section) & (niche >= 0) & ~read[near].any(1)
            for name, x in found.items():
                for score, of in classifiers.items():
                    if len(np.unique(niche[train])) < 2:
                        predicted = niche[train][0]
                    else:
                        predicted = of.fit(x[train], niche[train]).predict(x[test])
                    right[name][score] += int((predicted == niche[test]).sum())
    n_scored = int((niche >= 0).sum())
    return {name: {score: n / n_scored for score, n in scores.items()} for name, scores in right.items()}


def invariance(values: str, seed: int, args) -> dict:
    """Return how much z and theta change if sections are turned, or if neighbours or cells are missing."""
    if values == "simulated":
        adata = scgen.simulate_tissue(counts=False, seed=100 + seed)
    else:
        adata = read("her2st", args.data)
        adata.obsm["values"] = described(adata, "pca", seed, args.device)
    model, told = trained(adata, values, "simulated" if values == "simulated" else "pca", seed, args)
    rng, adata = np.random.default_rng(seed), model.adata
    codes = adata.obs["section"].cat.codes.to_numpy()
    alpha = rng.uniform(-np.pi, np.pi, codes.max() + 1)[codes]
    rotated = adata.copy()
    x, y = adata.obsm["spatial"].T
    rotated.obsm["spatial"] = np.column_stack(
        [x * np.cos(alpha) - y * np.sin(alpha), x * np.sin(alpha) + y * np.cos(alpha)]
    )
    every, kept = np.arange(adata.n_obs), np.flatnonzero(rng.random(adata.n_obs) >= 0.1)
    z, (theta, deviation) = model.get_latent_representation(), model.get_rotation(return_dist=True)
    after = {
        "rotated": (every, model.get_latent_representation(rotated), model.get_rotation(rotated) - alpha),
        "neighbours dropped": (every, *without_neighbours(model, seed)),
    }
    fewer = adata[kept].copy()
    after["cells dropped"] = (kept, model.get_latent_representation(fewer), model.get_rotation(fewer))
    active = model.active_units()["active"].to_numpy()
    groups = {"all": every >= 0, "certain half": deviation <= np.median(deviation)}
    if values == "simulated":
        obs = adata.obs
        groups["centres with orientation"] = (obs["is_centre"] & (obs["niche"] != "mixed")).to_numpy()
    changes = {}
    for name, (rows, other, turned) in after.items():
        for group, of in groups.items():
            some = of[rows]
            before = z[rows][some], theta[rows][some]
            changes[f"{name}, {group}"] = change(*before, other[some], turned[some], active)
    return {"changes": changes} | told


def without_neighbours(model: scgen.SpatialVAE, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return z and theta of the model's cells without a tenth of their neighbours, drawn for each cell anew."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(model.sources(model.adata)["mask"].shape, generator=generator) >= 0.1
    kept[:, 0] = True
    change_sources(model, mask=lambda mask: mask & kept)
    changed = model.get_latent_representation(), model.get_rotation()
    del model.sources
    return changed


def change_sources(model: scgen.SpatialVAE, **changes) -> None:
    """Let the model read its neighbourhoods with some of their parts changed by a function each."""
    sources = model.sources

    def changed(adata):
        found = sources(adata)
        return found | {name: of(found[name]) for name, of in changes.items()}

    model.sources = changed


def change(z, theta, other, turned, active) -> dict[str, float]:
    """Return the smallest correlation of a latent, of all and of the active ones, and how far theta is from itself."""
    correlations = np.array([np.corrcoef(before, after)[0, 1] for before, after in zip(z.T, other.T, strict=True)])
    error = np.angle(np.exp(1j * (turned - theta)))
    return {
        "z": float(correlations.min()),
        "z, active": float(correlations[active].min(initial=1.0)),
        "z, median": float(np.median(correlations)),
        "theta, mean cosine": float(np.cos(error).mean()),
        "theta, median error": float(np.median(np.abs(error))),
        "theta, share above 0.5": float((np.abs(error) > 0.5).mean()),
    }


def table(folder: Path) -> None:
    """Print medians, and smallest and largest values over the seeds, of each setting."""
    lines = []
    for setting in (*FILES, "invariance"):
        path = folder / f"{setting}.jsonl"
        lines += [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = "setting", "values", "n_latent", "without_places", "asked_epochs"
    for kind in dict.fromkeys(tuple(line[name] for name in names) for line in lines):
        of = [line for line in lines if tuple(line[name] for name in names) == kind]
        print("\n" + ", ".join(f"{name} {value}" for name, value in zip(names, kind, strict=True)))
        print(f"{len(of)} seeds, {[line['epochs'] for line in of]} epochs")
        print("seconds", spread([line["seconds"] for line in of]), "active", [line["active"] for line in of])
        part = "changes" if "changes" in of[0] else "scores"
        columns = list(of[0][part]["rotated, all"]) if part == "changes" else SCORES
        rows = {
            name: {column: spread([line[part][name][column] for line in of]) for column in columns}
            for name in of[0][part]
        }
        print(pd.DataFrame.from_dict(rows, orient="index").to_string())
        if part == "scores":
            print("majority", f"{of[0]['majority']:.3f}")


def main() -> None:
    """Run the setting that was asked for, or print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("setting", choices=[*FILES, "invariance", "table"])
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--values", nargs="+", choices=[*VALUES, *INVARIANCE], help="kinds of values; all by default")
    parser.add_argument("--n-latent", type=int, default=10)
    parser.add_argument("--epochs", type=int, help="passes over the cells; the model's default if not given")
    text = "train a model that reads which cells are neighbours, but not where they are"
    parser.add_argument("--without-places", action="store_true", help=text)
    parser.add_argument("--device", default="auto", help="accelerator of the trainings")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the data")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    if args.setting == "table":
        table(args.out)
        return
    kinds = INVARIANCE if args.setting == "invariance" else VALUES
    if wrong := set(args.values or kinds) - set(kinds):
        parser.error(f"--values {' '.join(sorted(wrong))}: {args.setting} has the values {', '.join(kinds)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for values in args.values or kinds:
            line = {"setting": args.setting, "values": values, "seed": seed, "n_latent": args.n_latent}
            line |= {"without_places": args.without_places, "asked_epochs": args.epochs}
            if args.setting == "invariance":
                line |= invariance(values, seed, args)
            else:
                line |= niches(args.setting, values, seed, args)
            text = json.dumps(line)
            with (args.out / f"{args.setting}.jsonl").open("a") as file:
                file.write(text + "\n")
            print(text, flush=True)


if __name__ == "__main__":
    main()
