"""What a user with a type checker writes; `test_types.py` has it checked, and nothing runs it."""

from pathlib import Path
from typing import assert_type

import anndata
import numpy as np
import pandas as pd

import scgen

adata: anndata.AnnData = scgen.simulate_cells(n_cells=100, n_genes=30, seed=0)
found: pd.DataFrame = scgen.check(adata, batch_key="batch")
scgen.setup_anndata(adata, batch_key="batch", continuous_covariate_keys=["log_library"])
model = scgen.SCVI(adata, n_latent=5, gene_likelihood="nb")
assert_type(model, scgen.SCVI)
model.train(max_epochs=3, progress=False, on_epoch=lambda row: print(row["epoch"]))
adata.obsm["X_scgen"] = model.get_latent_representation()
held_out = model.validation_indices
elbo = model.get_elbo(indices=held_out)
model.get_elbo(indices=[0, 1, 2], return_mean=False)
model.get_elbo(indices=np.arange(3))
rows = np.asarray(adata.obs["batch"] == "batch_1")
table: pd.DataFrame = model.differential_expression("cell_type", "type_1", adata=adata)
model.differential_expression(idx1=rows, idx2=~rows)
model.get_normalized_expression(gene_list=["gene_1"], library_size=1e4, n_samples=5, batch="batch_1")
model.history["elbo_validation"].max()
query = model.query(adata[:10].copy())
labels = query.transfer_labels("cell_type")
model.save("model")
model.save(Path("model"), overwrite=True)
again: scgen.SCVI = scgen.SCVI.load("model", adata)
integrated: scgen.SCVI = scgen.integrate(adata, "batch", n_top_genes=20, max_epochs=2)
chosen: scgen.Tuning = scgen.tune(adata)
checked: scgen.PosteriorPredictiveCheck = scgen.posterior_predictive_check(model)
scgen.plots.history(model, save="history.png")

model.train(max_epoch=3)  # type: ignore[call-arg]  # a misspelt name is found
scgen.SCVI(adata, n_latent="ten")  # type: ignore[arg-type]  # and a wrong type
scgen.SCVI.laod("model")  # type: ignore[attr-defined]  # a misspelt method of a class
model.get_elbos()  # type: ignore[attr-defined]  # and of an object
model.get_latent_representation(indexes=[0])  # type: ignore[call-arg]  # a misspelt argument
