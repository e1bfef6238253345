"""Whether `scgen.tune` finds as good a setting as all presets trained in full, and in what share of their time.

    python -m benchmarks.tuning run SET --seed 0      # every preset in full, and tune
    python -m benchmarks.tuning table

A fifth of the cells, stratified by batch, are the test cells, the same for all seeds; nothing is trained on them, nor
chosen by them. "test" is the mean log-likelihood of a tenth of their counts, given the others (`SCVI.get_thinned_ll`),
in nats per cell, and differences to the best preset are paired by cell. Seconds are of the processor ("cpu"), which
other work on the machine disturbs least, and by the clock ("wall"); compare them within a run alone. The kernels are
compiled before. "rank_correlation" is Spearman's, of the presets' scores in the first rung and in full, both on the
validation cells.
"""

import argparse
import json
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from benchmarks import pairs, protocol

RESULTS = Path(__file__).parent / "results" / "tuning"


def cells(name: str) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Return training and test cells."""
    import scgen

    adata, train, test = protocol.read(name)
    training = adata[train].copy()
    scgen.setup_anndata(training, batch_key="batch")
    return training, adata[test].copy()


def timed(task) -> tuple[object, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = task()
    return result, {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def in_full(adata: anndata.AnnData, arguments: dict, seed: int):
    import scgen

    model = scgen.SCVI(adata, seed=seed, **arguments)
    model.train(seed=seed, accelerator="cpu", progress=False)
    return model


def on_test(model, test: anndata.AnnData) -> np.ndarray:
    return model.get_thinned_ll(test, n_samples=25, return_mean=False)


def validation(model) -> float:
    return model.get_thinned_ll(indices=model.validation_indices, n_samples=25)


def mean_and_error(values: np.ndarray) -> list[float]:
    return [float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))]


def figures(name: str, seed: int) -> dict:
    import scgen

    adata, test = cells(name)
    scgen.tune(adata[:300].copy(), max_epochs=1, accelerator="cpu", progress=False)  # compiles
    tuning, seconds = timed(lambda: scgen.tune(adata, seed=seed, accelerator="cpu", progress=False))
    print(tuning.table.to_string(), seconds, flush=True)
    chosen, scores, presets = on_test(tuning.model, test), {}, {}
    for name, arguments in scgen.PRESETS.items():
        model, took = timed(lambda of=arguments: in_full(adata, of, seed))
        scores[name] = on_test(model, test)
        presets[name] = {"test": mean_and_error(scores[name]), "validation": validation(model), **took}
        presets[name]["epochs"] = len(model.history)
        print(name, presets[name], flush=True)
    best = max(scores, key=lambda name: scores[name].mean())
    for name, of in presets.items():
        of["above_best"] = mean_and_error(scores[name] - scores[best])
    first = tuning.table[tuning.table["rung"] == 1].set_index("candidate")["log_likelihood"]
    return {
        "presets": presets,
        "best": best,
        "chosen": tuning.best,
        "test": mean_and_error(chosen),
        "above_best": mean_and_error(chosen - scores[best]),
        "same_as_alone": bool(np.array_equal(chosen, scores[tuning.best])),
        "share": {of: seconds[of] / sum(one[of] for one in presets.values()) for of in ("cpu", "wall")},
        "rank_correlation": float(spearmanr(first, [presets[name]["validation"] for name in first.index])[0]),
        **seconds,
        "table": tuning.table.to_dict(orient="records"),
    }


def table() -> pd.DataFrame:
    """Return a row per kept run and preset, and one of what `tune` chose."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        run = json.loads(path.read_text())
        found = run["figures"]
        of = {f"{name} in full": one for name, one in found["presets"].items()} | {f"tune: {found['chosen']}": found}
        for name, one in of.items():
            (test, error), (above, above_error) = one["test"], one["above_best"]
            row = {
                "data": run["data"],
                "seed": run["seed"],
                "commit": run["commit"],
                "what": name,
                "test": test,
                "se": error,
            }
            rows.append(row | {"above_best": above, "above_se": above_error, "cpu": one["cpu"], "wall": one["wall"]})
        rows[-1] |= {"share_cpu": found["share"]["cpu"], "share_wall": found["share"]["wall"]}
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["run", "table"])
    parser.add_argument("data", nargs="?", default="hemato_mouse_bm", help="a set of ../shared/data")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.task == "run":
        commit = pairs.commit()
        result = {"data": asked.data, "seed": asked.seed, "commit": commit, "figures": figures(asked.data, asked.seed)}
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{asked.data}--{asked.seed}--{commit}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table().round(2).to_string())
