"""Seconds of an epoch on a GPU, beside scvi-tools on the same one: ``python -m benchmarks.gpu``.

The counts are simulated: negative binomial, about a tenth of them not zero, in two batches. Each package trains in a
fresh process, by its own ``train``; an epoch is the median of those after the first, which compiles. It is set against
what the device could do at best: per cell, 6 FLOP a weight (a product forward and two backward) and 50 bytes a gene
(100 kB at 2000 genes), whichever takes longer at the rates that the same device reached just before, on one large
bfloat16 product and one large copy.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.pairs import commit
from benchmarks.tasks import CACHE, model_of, trained

RESULTS = Path(__file__).parent / "results" / "gpu"
BYTES_A_GENE, FLOP_A_WEIGHT = 50, 6


def simulated(n_cells: int, n_genes: int, device: str = "cuda"):
    """Return simulated cells, made on the device by chunks and kept in the cache."""
    import anndata
    import pandas as pd
    from scipy import sparse

    path = CACHE / f"simulated-on-gpu-{n_cells}-{n_genes}.h5ad"
    if not path.exists():
        generator = torch.Generator(device).manual_seed(0)
        share = torch.from_numpy(np.random.default_rng(0).dirichlet(np.full(n_genes, 0.3))).float().to(device)
        blocks = []
        for start in range(0, n_cells, 16384):
            shape = min(16384, n_cells - start), n_genes
            size = torch.empty(shape[0], 1, device=device).log_normal_(0, 0.4, generator=generator)
            # theta = 1, whose gamma is an exponential
            rate = torch.empty(shape, device=device).exponential_(generator=generator) * size * share * n_genes * 0.17
            counts = torch.poisson(rate, generator=generator).to_sparse_csr()
            parts = counts.values(), counts.col_indices().int(), counts.crow_indices()
            blocks.append(sparse.csr_matrix(tuple(part.cpu().numpy() for part in parts), shape=shape))
        made = anndata.AnnData(sparse.vstack(blocks, "csr"))
        made.obs["batch"] = pd.Categorical(np.random.default_rng(0).integers(0, 2, n_cells).astype(str))
        CACHE.mkdir(exist_ok=True)
        made.write_h5ad(path)
    return anndata.read_h5ad(path)


def rates(device: str = "cuda", n: int = 8192) -> dict[str, float]:
    """Return the bytes and the bfloat16 FLOP that the device does in a second, the best of five."""
    matrix = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    large = torch.empty(n * n * 4, device=device)
    other = torch.empty_like(large)

    def best(action) -> float:
        times = []
        for _ in range(6):
            torch.cuda.synchronize()
            started = time.perf_counter()
            action()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:])

    copied = 2 * large.nbytes / best(lambda: other.copy_(large))
    return {"bytes": copied, "flop": 2 * n**3 / best(lambda: matrix @ matrix)}


def limit(n_cells: int, n_genes: int, n_weights: int, rate: dict[str, float]) -> float:
    """Return the seconds of an epoch that the device could do at best; see the top of this file."""
    return n_cells * max(BYTES_A_GENE * n_genes / rate["bytes"], FLOP_A_WEIGHT * n_weights / rate["flop"])


def run(package: str, n_cells: int, n_genes: int, epochs: int, batch_size: int | None) -> dict[str, float]:
    """Return what one package takes."""
    adata = simulated(n_cells, n_genes)
    started = time.perf_counter()
    model, seconds = trained(package, adata, False, epochs, batch_size, None)
    whole = time.perf_counter() - started
    n_trained = len(model.train_indices)
    result = {"seconds": statistics.median(seconds[1:]), "first": seconds[0], "train": whole, "cells": n_trained}
    return result | {"peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20}


def n_weights(n_genes: int) -> int:
    """Return the number of weights of the model's matrices."""
    import anndata
    import pandas as pd

    few = anndata.AnnData(np.ones((20, n_genes), np.float32), obs=pd.DataFrame({"batch": ["0", "1"] * 10}))
    few.obs_names = few.obs_names.astype(str)
    return sum(weight.numel() for weight in model_of("scgen", few, False).vae.parameters() if weight.dim() == 2)


def in_fresh_process(package: str, options: argparse.Namespace) -> dict | str:
    """Return what `run` does, or why there is nothing."""
    if package == "scvi-tools" and importlib.util.find_spec("scvi") is None:
        return "not installed here"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--only", package]
    for name in ("cells", "genes", "epochs", "batch_size"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else done.stderr[-2000:]


def compare(options: argparse.Namespace) -> dict:
    """Return what both packages take, and what the device could do."""
    simulated(options.cells, options.genes)  # here, so that no package's peak of memory includes the simulation's
    rate = rates()
    torch.cuda.empty_cache()
    result = {
        "device": torch.cuda.get_device_name(),
        "options": vars(options),
        "measured": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "versions": {"scgen": commit(), "torch": torch.__version__},
        "rates": rate,
    }
    for package in ("scgen", "scvi-tools"):
        found = in_fresh_process(package, options)
        if isinstance(found, dict):
            best = limit(found["cells"], options.genes, n_weights(options.genes), rate)
            found |= {"cells_per_second": found["cells"] / found["seconds"], "limit": best}
            found["share_of_limit"] = best / found["seconds"]
        result[package] = found
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, help="of both packages; each one's default if left out")
    parser.add_argument("--only", choices=["scgen", "scvi-tools"], help="one package, in this process")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA GPU, and torch sees none here: run it on a machine that has one.")
    if options.epochs < 2:
        parser.error("--epochs takes a number from 2: the first epoch compiles and is not counted.")
    if options.only:
        print(json.dumps(run(options.only, options.cells, options.genes, options.epochs, options.batch_size)))
        return
    result = compare(options)
    RESULTS.mkdir(parents=True, exist_ok=True)
    size = f"{options.cells}x{options.genes}"
    names = [result["device"].replace(" ", "-"), size, str(options.batch_size or "default")]
    path = RESULTS / f"{'--'.join([*names, result['versions']['scgen']])}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
