"""How well niches are told apart by arrangement, on simulated tissue of which the truth is known.

    python -m benchmarks.niches features [SEED ...]   # one seed or several (default 0 to 4), a line of JSON each
    python -m benchmarks.niches fixed [SEED ...]
    python -m benchmarks.niches random_types [SEED ...]
    python -m benchmarks.niches counts [SEED ...]
    python -m benchmarks.niches table

Four sections of `scgen.simulate_tissue`, without counts; again with a tenth of the types at random, and with counts.
Tissue and model of a seed have the seeds 100 + SEED and SEED. A `SpatialVAE` is trained on all cells, with its
defaults; for "fixed", without rotation, on the tissue of "features". Niches are scored on the centres of the motifs
(`scgen.score_niches`: each section is predicted from the others), beside baselines that need no model. "angles": the
length of the mean of exp(i (theta - truth)) for each niche, 1 where theta is the true angle but for a constant.
"invariance": the smallest correlation of a latent before and after each section was turned by a random angle, and the
mean error of theta's turn, in radians. Seconds are those of the training, on this machine, as it was.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

import scgen

RESULTS = Path(__file__).parent / "results" / "niches"
SETTINGS = {"features": {}, "fixed": {}, "random_types": {"random_types": 0.1}, "counts": {"counts": True}}
BASELINES = ("mean", "gradient", "pool")


def tissue(setting: str, seed: int) -> dict:
    """Return scores, angles and invariance of one seed."""
    adata = scgen.simulate_tissue(**{"counts": False} | SETTINGS[setting], seed=100 + seed)
    counts = SETTINGS[setting].get("counts", False)
    scgen.setup_anndata(adata, spatial_key="spatial", batch_key="section", counts=counts)
    started = time.perf_counter()
    model = scgen.SpatialVAE(adata, rotate=setting != "fixed", seed=seed)
    model.train(seed=seed, accelerator="cpu", progress=False)
    seconds = time.perf_counter() - started
    found = {"SpatialVAE": model.get_latent_representation()}
    found |= {name: scgen.neighborhood_features(adata, name, section_key="section") for name in BASELINES}
    types = {"labels_key": "cell_type", "section_key": "section"}
    found["composition"] = scgen.neighborhood_features(adata, "composition", **types)
    centre = adata.obs["is_centre"].to_numpy()
    scores = scgen.score_niches(adata, "niche", found, section_key="section", indices=centre)
    turning = {}
    if setting != "fixed":
        turning["angles"] = angles(model, adata[centre].obs, np.flatnonzero(centre))
        turning["invariance"] = invariance(model, adata, found["SpatialVAE"], seed)
    return {
        "setting": setting,
        "seed": seed,
        "scores": scores.to_dict("index"),
        **turning,
        "seconds": seconds,
        "epochs": len(model.history),
        "kl": model.history.filter(like="kl_").iloc[-1].to_dict(),
        "elbo": model.history["elbo_validation"].max(),
    }


def angles(model: scgen.SpatialVAE, centres: pd.DataFrame, rows: np.ndarray) -> dict[str, float]:
    """Return how well theta is the true angle of each niche, up to a constant."""
    turn = np.exp(1j * (model.get_rotation(indices=rows) - centres["angle"].to_numpy()))
    return {niche: float(abs(turn[centres["niche"] == niche].mean())) for niche in centres["niche"].cat.categories}


def invariance(model: scgen.SpatialVAE, adata, z: np.ndarray, seed: int) -> dict[str, float]:
    """Return how little z changes, and how well theta turns, if each section is turned."""
    rng, other, alpha = np.random.default_rng(seed), adata.copy(), np.empty(adata.n_obs)
    for section in adata.obs["section"].cat.categories:
        rows, a = (adata.obs["section"] == section).to_numpy(), rng.uniform(-np.pi, np.pi)
        turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
        other.obsm["spatial"][rows], alpha[rows] = adata.obsm["spatial"][rows] @ turn, a
    after = model.get_latent_representation(other)
    correlations = [np.corrcoef(before, of)[0, 1] for before, of in zip(z.T, after.T, strict=True)]
    error = np.angle(np.exp(1j * (model.get_rotation(other) - model.get_rotation() - alpha)))
    return {"z": float(min(correlations)), "theta": float(np.abs(error).mean())}


def table() -> None:
    """Print means, and smallest and largest values over the seeds."""
    lines = [json.loads(line) for path in sorted(RESULTS.glob("*.jsonl")) for line in path.read_text().splitlines()]
    for setting in SETTINGS:
        of = [line for line in lines if line["setting"] == setting]
        if not of:
            continue
        print(f"\n{setting}, {len(of)} seeds")
        columns = ["knn_accuracy", "knn_accuracy_scaled", "logistic_accuracy", "kmeans_ari", "kmeans_ari_scaled"]
        rows = {
            name: {column: spread([line["scores"][name][column] for line in of]) for column in columns}
            for name in of[0]["scores"]
        }
        print(pd.DataFrame.from_dict(rows, orient="index").to_string())
        for part in [name for name in ("angles", "invariance", "kl") if name in of[0]]:
            print(part, {name: spread([line[part][name] for line in of]) for name in of[0][part]})
        print("seconds", spread([line["seconds"] for line in of]), "epochs", of[0]["epochs"])


def spread(values: list[float]) -> str:
    """Return median, smallest and largest value as text."""
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main(what: str, *seeds: str) -> None:
    """Run the setting that was asked for, or print the table."""
    if what == "table":
        table()
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in map(int, seeds or range(5)):
        line = json.dumps(tissue(what, seed))
        with (RESULTS / f"{what}.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
