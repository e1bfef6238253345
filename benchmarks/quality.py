"""Quality and the time to it: ``python -m benchmarks.quality run SET METHOD --seed 0``, then ``... quality score``.

Each run is kept in ``benchmarks/results/quality`` under set, method, seed and the version (scgen: the commit) and is
not repeated. ``score`` adds the integration scores to every run that has none yet, in one process, because
scib-metrics compiles for a minute. ``python -m benchmarks.table quality`` prints the tables.
"""

import argparse
import json
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks import fair, protocol
from benchmarks.pairs import busy_share, commit

RESULTS = Path(__file__).parent / "results" / "quality"
CACHE = Path(__file__).parent / "cache"

#: Draws a cell for the marginal likelihood, of the test cells that `protocol.few` names.
N_DRAWS = 100


def run_pca(adata, train, test, seed):
    return fair.components(adata), {}


def run_harmonypy(adata, train, test, seed):
    import harmonypy

    started = time.perf_counter()
    embedding = harmonypy.run_harmony(fair.components(adata), adata.obs, "batch", random_state=seed).Z_corr
    seconds = time.perf_counter() - started
    return embedding if len(embedding) == adata.n_obs else embedding.T, {"seconds": seconds}


def run_scvi_tools(adata, train, test, seed, observed):
    import scvi

    scvi.settings.seed = seed
    reference, held_out = adata[train].copy(), adata[test].copy()
    scvi.model.SCVI.setup_anndata(reference, batch_key="batch")
    started = time.perf_counter()
    model = scvi.model.SCVI(reference, use_observed_lib_size=observed)
    model.train(enable_progress_bar=False)
    embedding = np.empty((adata.n_obs, 10), np.float32)
    embedding[train] = model.get_latent_representation()
    seconds = time.perf_counter() - started
    embedding[test] = model.get_latent_representation(held_out)
    # The sign of get_elbo has changed between releases; an ELBO of counts is negative.
    elbo = -np.mean([abs(float(model.get_elbo(held_out))) for _ in range(5)])
    few = adata[protocol.few(test)].copy()
    marginal = model.get_marginal_ll(few, n_mc_samples=N_DRAWS, n_mc_samples_per_pass=10)
    epochs = len(model.history["elbo_train"])
    return embedding, {"seconds": seconds, "epochs": epochs, "test_elbo": float(elbo), "marginal": float(marginal)}


def run_scgen(adata, train, test, seed, observed, precision="auto", prior="vamp"):
    import scgen

    reference = adata[train].copy()
    scgen.setup_anndata(reference, batch_key="batch")
    started = time.perf_counter()
    model = scgen.SCVI(reference, use_observed_lib_size=observed, prior=prior, seed=seed)
    model.train(seed=seed, progress=False, precision=precision)
    embedding = np.empty((adata.n_obs, 10), np.float32)
    embedding[train] = model.get_latent_representation()
    found = {"seconds": time.perf_counter() - started, "epochs": len(model.history)}
    if not len(test):
        return embedding, found
    embedding[test] = model.get_latent_representation(adata, indices=test)
    elbo = float(np.mean([model.get_elbo(adata, indices=test, seed=draw) for draw in range(5)]))
    marginal = model.get_marginal_ll(adata, indices=protocol.few(test), n_mc_samples=N_DRAWS)
    return embedding, found | {"test_elbo": elbo, "marginal": marginal}


METHODS = {
    "pca": run_pca,
    "harmonypy": run_harmonypy,
    "scvi-tools-observed": lambda *a: run_scvi_tools(*a, observed=True),
    "scvi-tools-latent": lambda *a: run_scvi_tools(*a, observed=False),
    "scgen-observed": lambda *a: run_scgen(*a, observed=True),
    "scgen-latent": lambda *a: run_scgen(*a, observed=False),
    # As users train. No cell is left for the test likelihoods.
    "scgen-latent-all-cells": lambda adata, train, test, seed: run_scgen(
        adata, np.arange(adata.n_obs), np.arange(0), seed, observed=False
    ),
    "scgen-latent-float32": lambda *a: run_scgen(*a, observed=False, precision="32"),
}
#: Methods with another prior than the default.
OF_PRIORS = {f"scgen-latent-{prior}": prior for prior in ("normal", "mog", "flow")}
METHODS |= {name: partial(run_scgen, observed=False, prior=prior) for name, prior in OF_PRIORS.items()}


def tag(method: str) -> str:
    """Return the version under which a run is kept: a peer's release, or our commit."""
    if method.startswith("scgen"):
        return commit()
    return version({"pca": "scanpy", "harmonypy": "harmonypy"}.get(method, "scvi-tools"))


def run(name: str, method: str, seed: int) -> None:
    kept_as = tag(method)
    path = RESULTS / f"{name}--{method}--{seed}--{kept_as}.json"
    if not path.exists():
        busy = busy_share() > 0.1
        adata, train, test = protocol.read(name)
        embedding, details = METHODS[method](adata, train, test, seed)
        CACHE.mkdir(exist_ok=True)
        np.savez(CACHE / path.with_suffix(".npz").name, embedding=embedding)
        result = {"set": name, "method": method, "seed": seed, "version": kept_as}
        result |= {"measured": time.strftime("%Y-%m-%dT%H:%M:%S")} | details
        if busy or busy_share() > 0.1:
            result |= {"seconds": None, "busy": True}  # another process ran beside it: its time is no measurement
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.read_text(), flush=True)


def score() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        result, cached = json.loads(path.read_text()), CACHE / path.with_suffix(".npz").name
        if "scores" not in result and cached.exists():
            adata, _, _ = protocol.read(result["set"])
            result["scores"] = protocol.scores(result["set"], adata, np.load(cached)["embedding"])
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(path.stem, {name: round(value, 3) for name, value in result["scores"].items()}, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("run")
    one.add_argument("set", help=f"one of {', '.join(protocol.SETS)} or of the other files; SET@N, SET+G")
    one.add_argument("method", choices=METHODS)
    one.add_argument("--seed", type=int, default=0)
    steps.add_parser("score")
    args = parser.parse_args()
    run(args.set, args.method, args.seed) if args.step == "run" else score()


if __name__ == "__main__":
    main()
