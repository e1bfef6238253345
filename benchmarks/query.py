"""How well cells of a donor that the reference has not seen are mapped: ``kang_ctrl_8donors``, every donor in turn.

    python -m benchmarks.query run scgen|scvi-tools|types [NAME ...]     # one training for each donor, or cell type
    python -m benchmarks.query table

A reference of the seven other donors is trained with the package's defaults, but scvi-tools for 100 epochs, over which
its KL warm-up runs (a quarter of its own default of each). The eighth donor's cells are mapped at once and after 100
epochs in which only what belongs to their batch is trained. Labels are transferred from the reference by the same rule
for both packages (`scgen.analysis.query.transfer`); the accuracy is the share of the donor's cells that get their own.
scvi-tools' embeddings lie in ``cache/``. ``types`` holds each cell type out of the reference, in all donors, maps a
fifth of the other cells, held out too, with it, and tells by how well `typicality` separates the two (AUROC).
"""

import sys
from pathlib import Path

import anndata
import numpy as np

from benchmarks import protocol

CACHE = Path(__file__).parent / "cache" / "query"
EPOCHS = 100


def cells() -> anndata.AnnData:
    return anndata.read_h5ad(protocol.DATA / "kang_ctrl_8donors.h5ad")


def run_scvi_tools(donor: str) -> None:
    import scvi

    adata = cells()
    new = (adata.obs["batch"] == donor).to_numpy()
    reference, query = adata[~new].copy(), adata[new].copy()
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(reference, batch_key="batch")
    model = scvi.model.SCVI(reference)
    silent = {"enable_progress_bar": False, "accelerator": "cpu"}
    model.train(EPOCHS, plan_kwargs={"n_epochs_kl_warmup": EPOCHS}, **silent)
    found = {"reference": model.get_latent_representation()}
    mapped = scvi.model.SCVI.load_query_data(query, model)
    mapped.is_trained_ = True
    found["at_once"] = mapped.get_latent_representation()
    mapped.is_trained_ = False
    mapped.train(EPOCHS, plan_kwargs={"weight_decay": 0.0, "n_epochs_kl_warmup": 1}, **silent)
    found["tuned"] = mapped.get_latent_representation()
    CACHE.mkdir(parents=True, exist_ok=True)
    np.savez(CACHE / f"scvi-tools-{donor}.npz", **found)


if __name__ == "__main__":
    donors = sys.argv[3:] or sorted(cells().obs["batch"].unique())
    for donor in donors:
        if not (CACHE / f"scvi-tools-{donor}.npz").exists():
            run_scvi_tools(donor)
