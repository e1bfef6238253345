"""One small trained model and its cells, for tests that only ask questions of them; copy before changing anything."""

import pytest

import scgen


@pytest.fixture(scope="session")
def cells():
    adata = scgen.simulate_cells(n_cells=120, n_genes=30, n_batches=2, n_types=3, seed=1)
    scgen.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    return adata


@pytest.fixture(scope="session")
def trained(cells):
    model = scgen.SCVI(cells, n_latent=4, n_hidden=16)
    model.train(max_epochs=3, accelerator="cpu", progress=False)
    return model
