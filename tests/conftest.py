"""One small trained model and its cells, for tests that only ask questions of them; copy before changing anything."""

import hashlib
import os
import tempfile
from pathlib import Path

import pytest

import scgen

# numba sees a change of the file that a compiled function is in, but not of those that it calls into.
KERNELS = sorted((Path(scgen.__file__).parent / "kernels").glob("*.py"))
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in KERNELS)).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"scgen-kernels-{VERSION}"))


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
