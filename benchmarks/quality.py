"""Quality and the time to it: ``python -m benchmarks.quality SET METHOD [--seed 0]``.

Each run is kept in ``benchmarks/results/quality`` under set, method, seed and the version (scgen: the commit) and is
not repeated. ``python -m benchmarks.table`` prints the tables.
"""

import argparse
import json
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks import protocol

RESULTS = Path(__file__).parent / "results" / "quality"


def run_pca(adata, train, test, seed):
    return protocol.pca(adata), None, {}


def run_harmonypy(adata, train, test, seed):
    import harmonypy

    embedding = harmonypy.run_harmony(protocol.pca(adata), adata.obs, "batch", random_state=seed).Z_corr
    return embedding if len(embedding) == adata.n_obs else embedding.T, None, {}


def run_scvi_tools(adata, train, test, seed, observed):
    import scvi

    scvi.settings.seed = seed
    reference, held_out = adata[train].copy(), adata[test].copy()
    scvi.model.SCVI.setup_anndata(reference, batch_key="batch")
    started = time.perf_counter()
    model = scvi.model.SCVI(reference, use_observed_lib_size=observed)
    model.train(enable_progress_bar=False)
    trained = time.perf_counter()
    embedding = np.empty((adata.n_obs, 10), np.float32)
    embedding[train] = model.get_latent_representation()
    embedding[test] = model.get_latent_representation(held_out)
    seconds = {"train": trained - started, "embed": time.perf_counter() - trained}
    # The sign of get_elbo has changed between releases; an ELBO of counts is negative.
    elbo = -np.mean([abs(float(model.get_elbo(held_out))) for _ in range(5)])
    return embedding, elbo, seconds | {"epochs": len(model.history["elbo_train"])}


def run_scgen(adata, train, test, seed, observed):
    import scgen

    reference = adata[train].copy()
    scgen.setup_anndata(reference, batch_key="batch")
    started = time.perf_counter()
    model = scgen.SCVI(reference, use_observed_lib_size=observed, seed=seed)
    model.train(seed=seed, progress=False)
    trained = time.perf_counter()
    embedding = np.empty((adata.n_obs, 10), np.float32)
    embedding[train] = model.get_latent_representation()
    embedding[test] = model.get_latent_representation(adata, indices=test)
    seconds = {"train": trained - started, "embed": time.perf_counter() - trained}
    elbo = np.mean([model.get_elbo(adata, indices=test, seed=draw) for draw in range(5)])
    return embedding, float(elbo), seconds | {"epochs": len(model.history)}


METHODS = {
    "pca": run_pca,
    "harmonypy": run_harmonypy,
    "scvi-tools-observed": lambda *a: run_scvi_tools(*a, observed=True),
    "scvi-tools-latent": lambda *a: run_scvi_tools(*a, observed=False),
    "scgen-observed": lambda *a: run_scgen(*a, observed=True),
    "scgen-latent": lambda *a: run_scgen(*a, observed=False),
}


def tag(method: str) -> str:
    """Return the version under which a run is kept: a peer's release, or our commit."""
    if method.startswith("scgen"):
        return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return version({"pca": "scanpy", "harmonypy": "harmonypy"}.get(method, "scvi-tools"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=protocol.SETS)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = RESULTS / f"{args.set}--{args.method}--{args.seed}--{tag(args.method)}.json"
    if path.exists():
        print(path.read_text())
        return
    adata, train, test = protocol.read(args.set)
    started = time.perf_counter()
    embedding, elbo, details = METHODS[args.method](adata, train, test, args.seed)
    seconds = time.perf_counter() - started if elbo is None else details.pop("train") + details.pop("embed")
    print(f"{args.method}: {seconds:.1f} s, test ELBO {elbo}, {details}", flush=True)
    result = {"set": args.set, "method": args.method, "seed": args.seed, "version": tag(args.method)}
    result |= {"date": time.strftime("%Y-%m-%d"), "seconds": round(seconds, 2), "test_elbo": elbo} | details
    cache = Path(__file__).parent / "cache"
    cache.mkdir(exist_ok=True)
    np.savez(cache / path.with_suffix(".npz").name, embedding=embedding)
    result["scores"] = protocol.scores(adata, embedding, protocol.SETS[args.set][1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
