"""Guards against over-correction: ``python -m benchmarks.guards run METHOD --seed 0``, then ``... guards score``.

Sets of which the truth is known, cut from ``kang_ctrl_8donors``: three donors as batches, 500 cells each.

- own: one type (FCGR3A+ monocytes, next to the CD14+ ones) is in one batch only.
- removed: a type is missing from one batch: B cells, or the FCGR3A+ monocytes.
- tenfold: nine tenths of the CD14+ monocytes of one batch are missing.
- null: the cells of one donor, split at random in two batches, and the same cells without batches.

For the first three, purity is the share of a cell's 15 nearest neighbours that are of its type, over the cells of the
type in question, and over all types, each weighing the same; mixing is the share of neighbours from other batches
among the neighbours of its type, for the types that no guard touches, over what chance would give. For null, overlap
is the share of common cells among the 15 nearest neighbours under two trainings with different seeds: of the split
with the unsplit, against unsplit with unsplit.
"""

import argparse
import itertools
import json
import time

import anndata
import numpy as np
from sklearn.neighbors import NearestNeighbors

from benchmarks import fair, protocol
from benchmarks.quality import CACHE, OF_PRIORS, RESULTS, tag
from benchmarks.tasks import model_of

DONORS = ["donor_1015", "donor_1256", "donor_1488"]
FOLDER = RESULTS.parent / "guards"
K = 15

#: guard -> (type, batches that lose cells of it, share of them that they keep)
CHANGES = {
    "own": ("FCGR3A+ Monocytes", DONORS[1:], 0.0),
    "removed B": ("B cells", DONORS[:1], 0.0),
    "removed FCGR3A": ("FCGR3A+ Monocytes", DONORS[:1], 0.0),
    "tenfold": ("CD14+ Monocytes", DONORS[:1], 0.1),
}
NULLS = ["null split", "null unsplit"]


def cells(guard: str) -> anndata.AnnData:
    """Return the cells of a guard, with their batch in ``obs["batch"]``; the same for every method and seed."""
    adata, _, _ = protocol.read("kang_ctrl_8donors")
    rng = np.random.default_rng(0)
    donors, types = adata.obs["batch"].astype(str).to_numpy(), adata.obs["cell_type"].astype(str).to_numpy()
    if guard in NULLS:
        some = adata[np.sort(rng.permutation(np.flatnonzero(donors == DONORS[0]))[:1000])].copy()
        some.obs["batch"] = rng.integers(0, 2, some.n_obs).astype(str) if guard == "null split" else "all"
    else:
        name, losers, share = CHANGES[guard]
        lost = (types == name) & np.isin(donors, losers) & (rng.random(len(donors)) >= share)
        picked = [rng.permutation(np.flatnonzero((donors == donor) & ~lost))[:500] for donor in DONORS]
        some = adata[np.sort(np.concatenate(picked))].copy()
        some.obs["batch"] = some.obs["batch"].astype(str)
    some.obs["batch"] = some.obs["batch"].astype("category")
    return some


def embedding_of(method: str, adata: anndata.AnnData, seed: int) -> np.ndarray:
    if method == "pca":
        return fair.components(adata)
    if method == "scgen-5-models":
        import scgen

        scgen.integrate(adata, "batch", n_models=5, seed=5 * seed, progress=False)  # no two share a model
        return adata.obsm["X_scgen"]
    if method == "scvi-tools-observed":
        model = model_of("scvi-tools", adata, True, seed)
        model.train(enable_progress_bar=False)
    else:
        model = model_of("scgen", adata, method == "scgen-observed", seed, OF_PRIORS.get(method, "vamp"))
        model.train(seed=seed, progress=False)
    return model.get_latent_representation()


def run(method: str, seed: int) -> None:
    CACHE.mkdir(exist_ok=True)
    for guard in [*CHANGES, *NULLS]:
        path = CACHE / f"guard--{guard}--{method}--{seed}--{tag(method)}.npz"
        if not path.exists():
            np.savez(path, embedding=embedding_of(method, cells(guard), seed))
            print(path.stem, flush=True)


def neighbours(embedding: np.ndarray) -> np.ndarray:
    """Return the indices of the nearest neighbours of each cell, (n, K), without the cell."""
    return NearestNeighbors(n_neighbors=K).fit(embedding).kneighbors(return_distance=False)


def kept_apart(guard: str, adata: anndata.AnnData, embedding: np.ndarray) -> dict[str, float]:
    """Return purity of the type in question and of all, and mixing of the others."""
    near = neighbours(embedding)
    types, batches = adata.obs["cell_type"].astype(str).to_numpy(), adata.obs["batch"].astype(str).to_numpy()
    same = types[near] == types[:, None]
    each = {name: float(same[types == name].mean()) for name in np.unique(types) if (types == name).sum() > K}
    chosen = CHANGES[guard][0]
    ratios = []
    for name in set(each) - {chosen}:
        of_type = types == name
        shares = {batch: np.mean(batches[of_type] != batch) for batch in np.unique(batches)}
        for i in np.flatnonzero(of_type):
            if same[i].any() and shares[batches[i]]:
                ratios.append(np.mean(batches[near[i][same[i]]] != batches[i]) / shares[batches[i]])
    return {"purity": each[chosen], "purity of all": float(np.mean(list(each.values()))), "mixing": np.mean(ratios)}


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean share of common neighbours."""
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(one, other, strict=True)]))


def score() -> None:
    found: dict[tuple[str, str], dict] = {}
    measured: dict[tuple[str, str], float] = {}
    for path in sorted(CACHE.glob("guard--*.npz")):
        _, guard, method, seed, version = path.stem.split("--")
        measured[method, version] = max(measured.get((method, version), 0), path.stat().st_mtime)
        found.setdefault((method, version), {}).setdefault(guard, {})[int(seed)] = np.load(path)["embedding"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for (method, version), guards in found.items():
        result = {"method": method, "version": version, "guards": {}}
        result["measured"] = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(measured[method, version]))
        for guard in CHANGES.keys() & guards.keys():
            adata = cells(guard)
            rows = [kept_apart(guard, adata, embedding) for _, embedding in sorted(guards[guard].items())]
            result["guards"][guard] = {name: [row[name] for row in rows] for name in rows[0]}
        if set(NULLS) <= guards.keys():
            split, unsplit = ({s: neighbours(e) for s, e in guards[guard].items()} for guard in NULLS)
            result["guards"]["null"] = {
                "overlap split, unsplit": [overlap(split[a], unsplit[b]) for a in split for b in unsplit if a != b],
                "overlap of seeds": [overlap(unsplit[a], unsplit[b]) for a, b in itertools.combinations(unsplit, 2)],
            }
        path = FOLDER / f"{method}--{version}.json"
        path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        print(path.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("run")
    methods = ["pca", "scgen-latent", "scgen-5-models", "scgen-observed", "scvi-tools-observed", *OF_PRIORS]
    one.add_argument("method", choices=methods)
    one.add_argument("--seed", type=int, default=0)
    steps.add_parser("score")
    args = parser.parse_args()
    run(args.method, args.seed) if args.step == "run" else score()


if __name__ == "__main__":
    main()
