"""The same model on a GPU: needs one, and is skipped elsewhere."""

import numpy as np
import pytest
import torch

import scgen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_training_on_a_gpu_is_as_good(precision):
    adata = scgen.simulate_cells(n_cells=1000, n_genes=100, n_batches=2, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    elbos = {}
    for accelerator in ("cpu", "gpu"):
        model = scgen.SCVI(adata)
        model.train(30, accelerator=accelerator, precision="32" if accelerator == "cpu" else precision, progress=False)
        elbos[accelerator] = model.get_elbo()
        assert np.isfinite(model.get_latent_representation()).all()
    assert elbos["gpu"] == pytest.approx(elbos["cpu"], rel=0.01)


def test_a_model_trained_on_a_gpu_loads_without_one(tmp_path):
    adata = scgen.simulate_cells(n_cells=100, n_genes=20, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata)
    model.train(1, accelerator="gpu", progress=False)
    model.save(tmp_path / "model")
    loaded = scgen.SCVI.load(tmp_path / "model", adata)
    assert loaded.vae.device.type == "cpu"
    np.testing.assert_allclose(loaded.get_latent_representation(), model.get_latent_representation(), atol=1e-3)
