"""Models saved by earlier versions go on loading, and answer as they did.

Each folder under ``frozen/`` is one: ``model/`` as saved, and ``cells.npz`` with the counts and batches that it was
asked about and its answers. They are never made anew; a new format gets a new folder:
``python tests/models/test_frozen.py VERSION``.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData

import scgen

FROZEN = Path(__file__).parent / "frozen"


def cells_of(stored) -> AnnData:
    adata = AnnData(stored["counts"].astype(np.float32))
    adata.var_names = [f"gene_{i + 1}" for i in range(adata.n_vars)]
    adata.obs["batch"] = stored["batch"]
    return adata


@pytest.mark.parametrize("folder", sorted(FROZEN.iterdir()), ids=lambda path: path.name)
def test_loads_and_answers_as_it_did(folder):
    stored = np.load(folder / "cells.npz", allow_pickle=False)
    model = scgen.SCVI.load(folder / "model", cells_of(stored))
    np.testing.assert_allclose(model.get_latent_representation(), stored["latent"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.get_latent_library_size(), stored["library"], rtol=1e-4)
    # From the noise of a seed, which torch does not promise to keep: the mean over many draws.
    expression = model.get_normalized_expression(batch="b", n_samples=300, return_numpy=True)
    np.testing.assert_allclose(expression, stored["expression"], rtol=0.1, atol=2e-3)


def freeze(version: str) -> None:
    """Train a small model with every kind of part, and keep it."""
    simulated = scgen.simulate_cells(60, 12, n_batches=2, seed=0)
    stored = {"counts": simulated.X.toarray().astype(np.int32)}
    stored["batch"] = np.where(simulated.obs["batch"] == "batch_1", "a", "b")
    adata = cells_of(stored)
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, n_latent=3, n_hidden=8, n_layers=2, dispersion="gene-batch")
    model.train(20, progress=False)
    model.save(FROZEN / version / "model")
    stored |= {"latent": model.get_latent_representation(), "library": model.get_latent_library_size()}
    stored["expression"] = model.get_normalized_expression(batch="b", n_samples=2000, return_numpy=True)
    np.savez_compressed(FROZEN / version / "cells.npz", **stored)


if __name__ == "__main__":
    freeze(sys.argv[1])
