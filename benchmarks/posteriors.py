"""What posteriors beyond the Gaussian with independent components, and priors beyond N(0, I), bring, and their cost.

    python -m benchmarks.posteriors run SET --seed 0    # every one trained, by the defaults of training
    python -m benchmarks.posteriors score               # integration scores of what has none yet
    python -m benchmarks.posteriors time SET            # an epoch of each beside the Gaussian's, in turns
    python -m benchmarks.posteriors clusters            # the mixture's own clusters of pbmc3k, and Leiden's
    python -m benchmarks.posteriors gap SET             # what of log p(x) - ELBO is the encoder's, what q's
    python -m benchmarks.posteriors table

A fifth of the cells is held out, the same for all; decoder, its size and training are the same. "ELBO" is the held-out
cells' mean over five draws, "marginal" that of 200 of them from 1000 importance-weighted draws each, in nats per cell.
Scores are scib-metrics', unscaled: iLISI where there are batches, bio (without its isolated labels where there is one
batch) where there are labels.
"""

import argparse
import json
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from benchmarks import pairs, protocol

RESULTS = Path(__file__).parent / "results" / "posteriors"
CACHE = Path(__file__).parent / "cache" / "posteriors"
SETS = ("hemato_mouse_bm", "paul15_hematopoiesis", "pbmc_10k_5k_cite")

#: Arguments of the model, and of its training. The priors that are mixtures have the default penalty on batches.
KINDS = {
    "normal": ({"prior": "normal"}, {}),
    "posterior planar": ({"posterior": "planar", "prior": "normal"}, {}),
    "posterior iaf": ({"posterior": "iaf", "prior": "normal"}, {}),
    "prior mog": ({"prior": "mog"}, {}),
    "prior vamp": ({"prior": "vamp"}, {}),
    "prior flow": ({"prior": "flow"}, {}),
    "posterior iaf, prior vamp": ({"posterior": "iaf", "prior": "vamp"}, {}),
    "5 importance samples": ({"prior": "normal"}, {"n_importance_samples": 5}),
}


def path_of(name: str, kind: str, seed: int) -> Path:
    return RESULTS / f"{name}--{kind.replace(' ', '_').replace(',', '')}--{seed}.json"


def run(name: str, kind: str, seed: int, version: str) -> None:
    import scgen

    path = path_of(name, kind, seed)
    if path.exists() and json.loads(path.read_text())["version"] == version:
        return
    adata, train, test = protocol.read(name)
    reference = adata[train].copy()
    scgen.setup_anndata(reference, batch_key="batch")
    of_model, of_training = KINDS[kind]
    model = scgen.SCVI(reference, seed=seed, **of_model)
    model.train(seed=seed, progress=False, **of_training)
    embedding = model.get_latent_representation(adata)
    elbo = np.mean([model.get_elbo(adata, indices=test, seed=draw) for draw in range(5)])
    some = protocol.few(test, 200)
    marginal, ess = model.get_marginal_ll(adata, indices=some, n_mc_samples=1000, return_ess=True)
    result = {"set": name, "kind": kind, "seed": seed, "version": version, "epochs": len(model.history)}
    result |= {"measured": time.strftime("%Y-%m-%dT%H:%M:%S"), "ELBO": float(elbo), "marginal": float(marginal.mean())}
    result |= {"effective draws": float(np.median(ess)), "latents": int(model.active_units()["active"].sum())}
    for folder in (RESULTS, CACHE):
        folder.mkdir(parents=True, exist_ok=True)
    np.savez(CACHE / path.with_suffix(".npz").name, embedding=embedding)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(name, kind, seed, {key: round(result[key], 2) for key in ("ELBO", "marginal", "effective draws")}, flush=True)


def score() -> None:
    for path in sorted(RESULTS.glob("*--*.json")):
        result = json.loads(path.read_text())
        cached = CACHE / path.with_suffix(".npz").name
        if "scores" not in result and cached.exists():
            adata, _, _ = protocol.read(result["set"])
            found = protocol.scores(result["set"], adata, np.load(cached)["embedding"])
            result["scores"] = {key: found[key] for key in ("iLISI", "bio", "total") if key in found}
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(path.stem, {key: round(value, 3) for key, value in result["scores"].items()}, flush=True)


def time_epochs(name: str, n_rounds: int = 5, n_epochs: int = 3) -> None:
    """Write the ratio of each kind's median epoch to the Gaussian's of the same round."""
    import scgen

    pairs.refuse_if_busy()
    version = pairs.commit()
    adata, train, _ = protocol.read(name)
    reference = adata[train].copy()
    scgen.setup_anndata(reference, batch_key="batch")
    ratios = {kind: [] for kind in KINDS}
    for _ in range(n_rounds):
        seconds = {}
        for kind, (of_model, of_training) in KINDS.items():
            model = scgen.SCVI(reference, **of_model)
            model.train(n_epochs, progress=False, **of_training)
            seconds[kind] = float(model.history["seconds"].median())
            ratios[kind].append(seconds[kind] / seconds["normal"])
    result = {"version": version, "measured": time.strftime("%Y-%m-%dT%H:%M:%S"), "seconds": seconds["normal"]}
    result["ratios"] = ratios
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"time_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for kind, values in ratios.items():
        print(f"{name}: {kind}: {np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})", flush=True)


def clusters() -> None:
    """Write how well the mixture's components, and Leiden's clusters at its default resolution, agree with labels."""
    import scanpy as sc
    from sklearn.metrics import adjusted_rand_score

    import scgen

    result = {"version": pairs.commit(), "measured": time.strftime("%Y-%m-%dT%H:%M:%S"), "runs": []}
    adata = anndata.read_h5ad(protocol.DATA / "pbmc3k.h5ad")
    scgen.setup_anndata(adata)
    labels = adata.obs["cell_type"].astype(str)
    for seed in range(3):
        for prior in ("normal", "mog"):
            model = scgen.SCVI(adata, prior=prior, seed=seed)
            model.train(seed=seed, progress=False)
            adata.obsm["X_scgen"] = model.get_latent_representation()
            sc.pp.neighbors(adata, use_rep="X_scgen")
            sc.tl.leiden(adata, flavor="igraph", random_state=0)
            found = {"Leiden": adata.obs["leiden"]}
            if prior == "mog":
                found["components"] = model.get_cluster_probs().idxmax(axis=1)
            for name, one in found.items():
                row = {"seed": seed, "prior": prior, "clusters": name, "number": int(one.nunique())}
                result["runs"].append(row | {"adjusted Rand index": float(adjusted_rand_score(labels, one))})
                print(result["runs"][-1], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "clusters.json").write_text(json.dumps(result, indent=1) + "\n")


def gap(name: str, n_seeds: int = 3, n_cells: int = 200) -> None:
    """Write the held-out cells' ELBO by the encoder, by Gaussians fitted to each cell alone, and their log p(x)."""
    import scgen
    from scgen.models import loaders

    result = {"version": pairs.commit(), "measured": time.strftime("%Y-%m-%dT%H:%M:%S"), "runs": []}
    adata, train, test = protocol.read(name)
    reference = adata[train].copy()
    scgen.setup_anndata(reference, batch_key="batch")
    for seed in range(n_seeds):
        model = scgen.SCVI(reference, seed=seed)
        model.train(seed=seed, progress=False)
        (cells,) = loaders.of_question(model, adata, protocol.few(test, n_cells), n_cells)
        result["runs"].append({"seed": seed} | gap_of(model.vae, cells.to(model.vae.device), seed))
        print(name, result["runs"][-1], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"gap_{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def gap_of(vae, cells, seed: int, n_steps: int = 300, n_draws: int = 960) -> dict[str, float]:
    """Return the figures of `gap`.

    The fitted Gaussians start at the encoder's; the decoder stays as it is. They are what log p(x) is estimated with.
    """
    import torch

    from scgen.analysis.inference import log_sums
    from scgen.distributions import DiagonalNormal

    vae.eval().requires_grad_(False)
    torch.manual_seed(seed)
    parameters = {
        latent: [q.mean.clone().requires_grad_(), q.variance.log().requires_grad_()]
        for latent, q in vae.infer(cells).items()
    }

    def log_weights(shape: tuple[int]) -> torch.Tensor:
        q = {latent: DiagonalNormal(mean, log_variance.exp()) for latent, (mean, log_variance) in parameters.items()}
        return vae.log_weights(cells, q, shape)

    with torch.no_grad():
        found = {"encoder": float(log_weights((100,)).mean())}
    optimizer = torch.optim.Adam([one for both in parameters.values() for one in both], 0.02)
    for _ in range(n_steps):
        optimizer.zero_grad()
        (-log_weights((4,)).mean(0).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        found["fitted"] = float(log_weights((100,)).mean())
        found["log p(x)"] = float((log_sums(log_weights, n_draws)[0] - np.log(n_draws)).mean())
    return found


def table() -> pd.DataFrame:
    """Return a row per set and kind: differences to the Gaussian of the same seed, and scores."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*--*.json"))]
    plain = {(run["set"], run["seed"]): run for run in runs if run["kind"] == "normal"}
    rows = {}
    for name in SETS:
        timed = RESULTS / f"time_{name}.json"
        ratios = json.loads(timed.read_text())["ratios"] if timed.exists() else {}
        for kind in KINDS:
            mine = [run for run in runs if (run["set"], run["kind"]) == (name, kind)]
            if not mine:
                continue
            row = {"seeds": len(mine)}
            for figure in ("ELBO", "marginal"):
                beyond = [run[figure] - plain[name, run["seed"]][figure] for run in mine]
                row[figure] = spread([run[figure] for run in mine], 1)
                row[f"{figure}, difference"] = spread(beyond, 1) if kind != "normal" else ""
            row |= {figure: spread([run[figure] for run in mine], 0) for figure in ("effective draws", "latents")}
            for figure in ("iLISI", "bio", "total"):
                values = [run["scores"][figure] for run in mine if figure in run.get("scores", {})]
                row[figure] = spread(values, 3) if values else ""
            row["epoch, ratio"] = f"{np.median(ratios[kind]):.2f}" if kind in ratios else ""
            rows[name, kind] = row
    return pd.DataFrame(rows).T


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["run", "score", "time", "clusters", "gap", "table"])
    parser.add_argument("set", nargs="?", choices=SETS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.task in ("run", "time", "gap") and arguments.set is None:
        parser.error("name a set")
    if arguments.task == "run":
        version = pairs.commit()
        for kind in KINDS:
            run(arguments.set, kind, arguments.seed, version)
    elif arguments.task == "time":
        time_epochs(arguments.set)
    elif arguments.task == "clusters":
        clusters()
    elif arguments.task == "gap":
        gap(arguments.set)
    elif arguments.task == "score":
        score()
    else:
        print(table().to_string())


if __name__ == "__main__":
    main()
