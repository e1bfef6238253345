"""What is measured, one task a process: ``python -m benchmarks.tasks PACKAGE TASK DATA [NAME=VALUE ...]``.

Prints one line of JSON. ``benchmarks.pairs`` runs these in turns, scgen and scvi-tools, on the same data: the training
cells of a real set, by its name, or, as in "20000x2000", simulated cells and genes: negative binomial, about a tenth of
them not zero, in two batches.
"""

import json
import sys
import time
import warnings
from pathlib import Path

# What a task imports, it imports itself: the imports are measured too.
CACHE = Path(__file__).parent / "cache"


def cells(data: str):
    """Return the cells; simulated ones are made once and kept."""
    import anndata

    if not data[0].isdigit():
        from benchmarks import protocol

        adata, train, _ = protocol.read(data)
        return adata[train].copy()
    import numpy as np
    import pandas as pd
    from scipy import sparse

    n_cells, n_genes = (int(number) for number in data.split("x"))
    path = CACHE / f"simulated-{n_cells}-{n_genes}.h5ad"
    if not path.exists():
        rng = np.random.default_rng(0)
        share = rng.dirichlet(np.full(n_genes, 0.3))
        blocks = []
        for start in range(0, n_cells, 4000):
            n = min(4000, n_cells - start)
            mu = rng.lognormal(0, 0.4, (n, 1)) * share * (n_genes * 0.17)
            blocks.append(sparse.csr_matrix(rng.poisson(rng.gamma(1.0, mu)).astype(np.float32)))
        batch = pd.Categorical(rng.integers(0, 2, n_cells).astype(str))
        made = anndata.AnnData(sparse.vstack(blocks).tocsr(), obs=pd.DataFrame({"batch": batch}))
        made.obs_names, made.var_names = made.obs_names.astype(str), made.var_names.astype(str)
        CACHE.mkdir(exist_ok=True)
        made.write_h5ad(path)
    return anndata.read_h5ad(path)


def model_of(package: str, adata, observed: bool, seed: int = 0, prior: str = "vamp"):
    if package == "scgen":
        import scgen

        scgen.setup_anndata(adata, batch_key="batch")
        return scgen.SCVI(adata, use_observed_lib_size=observed, prior=prior, seed=seed)
    import scvi

    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    return scvi.model.SCVI(adata, use_observed_lib_size=observed)


def trained(package: str, adata, observed: bool, epochs: int, batch_size: int | None, precision: str | None):
    """Return a model trained for some epochs, and the seconds of each."""
    model = model_of(package, adata, observed)
    size = {} if batch_size is None else {"batch_size": batch_size}
    if package == "scgen":
        model.train(epochs, progress=False, **size, **({} if precision is None else {"precision": precision}))
        return model, model.history["seconds"].tolist()
    import lightning

    class Clock(lightning.pytorch.Callback):
        seconds = ()

        def on_train_epoch_start(self, *_):
            self.started = time.perf_counter()

        def on_train_epoch_end(self, *_):
            self.seconds = (*self.seconds, time.perf_counter() - self.started)

    clock = Clock()
    model.train(epochs, enable_progress_bar=False, callbacks=[clock], **size)
    return model, list(clock.seconds)


def step(package, data, observed="0", epochs="4", batch_size=None, precision=None):
    """Return the median seconds of an epoch, as ``train`` runs it, but for the first."""
    size = None if batch_size is None else int(batch_size)
    import numpy as np

    _, seconds = trained(package, cells(data), observed == "1", int(epochs), size, precision)
    return {"seconds": float(np.median(seconds[1:])), "first": seconds[0], "peak_mb": peak()}


def questions(package, data, observed="0"):
    """Return the seconds that each question to a model takes, the best of two after a first one."""
    import numpy as np

    adata = cells(data)
    model, _ = trained(package, adata, observed == "1", 1, None, None)
    some, few = np.arange(20_000), np.arange(1000)
    at_once = {} if package == "scgen" else {"n_mc_samples_per_pass": 10}  # scvi-tools' default, 1, takes longer
    asked = {
        "latent": lambda: model.get_latent_representation(),
        "elbo": lambda: model.get_elbo(),
        "normalised expression": lambda: model.get_normalized_expression(indices=some),
        "marginal likelihood": lambda: model.get_marginal_ll(indices=few, n_mc_samples=100),
        "marginal likelihood, at once": lambda: model.get_marginal_ll(indices=few, n_mc_samples=100, **at_once),
    }
    figures = {}
    for name, ask in asked.items():
        times = []
        for _ in range(3):
            started = time.perf_counter()
            ask()
            times.append(time.perf_counter() - started)
        figures[name] = min(times[1:])
    return figures


def imports(package, data):
    """Return the seconds of the import, and of the first use of the model's class, which loads what it needs."""
    started = time.perf_counter()
    module = __import__("scgen" if package == "scgen" else "scvi")
    imported = time.perf_counter()
    _ = module.SCVI if package == "scgen" else module.model.SCVI
    return {"import": imported - started, "import and class": time.perf_counter() - started, "peak_mb": peak()}


def whole(package, data, observed="0", epochs="4"):
    """Return the seconds of the package's import, a default training and the embedding of its cells.

    scvi-tools trains for some epochs only; their median, but for the first, stands for each of its default number.
    """
    import statistics

    adata = cells(data)
    started = time.perf_counter()
    if package == "scgen":
        model = model_of(package, adata, observed == "1")
        model.train(progress=False)
        model.get_latent_representation()
        return {"seconds": time.perf_counter() - started, "epochs": len(model.history)}
    from scvi.model._utils import get_max_epochs_heuristic

    model, seconds = trained(package, adata, observed == "1", int(epochs), None, None)
    model.get_latent_representation()
    n_epochs = get_max_epochs_heuristic(adata.n_obs)
    more = (n_epochs - len(seconds)) * statistics.median(seconds[1:])
    return {"seconds": time.perf_counter() - started + more, "epochs": n_epochs}


def imported(package, data):
    """Return the model that scvi-tools trained for a few epochs, and saved, as a model of the package's."""
    adata, folder = cells(data), CACHE / f"scvi-tools-{data}"
    if not folder.exists():
        trained("scvi-tools", adata.copy(), False, 20, None, None)[0].save(folder)
    if package == "scgen":
        import scgen

        return scgen.SCVI.from_scvi_tools(folder, adata)
    import scvi

    return scvi.model.SCVI.load(folder, adata, accelerator="cpu")


def differences(package, data):
    """Return the seconds that a comparison of every cell type with the rest takes, by the same weights; keep its table.

    Of scvi-tools with ``mode="change"``, as scgen's default is; both leave each cell in its own batch.
    """
    model = imported(package, data)
    mode = {} if package == "scgen" else {"mode": "change", "silent": True}
    started = time.perf_counter()
    table = model.differential_expression(groupby="cell_type", batch_correction=False, **mode)
    seconds = time.perf_counter() - started
    table.rename_axis("gene").to_csv(CACHE / f"differences-{package}-{data}.csv")
    return {"seconds": seconds, "peak_mb": peak()}


def load(package, data):
    """Have simulated cells made, and everything read once."""
    return {"cells": cells(data).n_obs}


def peak() -> float:
    """Return the largest resident memory of this process, in MB (not its parent's, as getrusage may)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main():
    warnings.filterwarnings("ignore")
    package, task, data, *options = sys.argv[1:]
    chosen = dict(option.split("=") for option in options)
    tasks = {"step": step, "questions": questions, "imports": imports, "whole": whole, "load": load}
    tasks |= {"differences": differences}
    print(json.dumps(tasks[task](package, data, **chosen)))


if __name__ == "__main__":
    main()
