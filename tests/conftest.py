"""One small trained model and its cells, for tests that only ask questions of them; copy before changing anything."""

import hashlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Workers of pytest-xdist share the processors. Threads of several workers would wait for each other, so each worker and
# the processes that it starts use one thread. The variable must be set before torch is loaded.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

import scgen  # noqa: E402
from scgen import threads  # noqa: E402

# numba sees a change of the file that a compiled function is in, but not of those that it calls into.
KERNELS = sorted((Path(scgen.__file__).parent / "kernels").rglob("*.py"))
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in KERNELS)).hexdigest()[:16]
# Each worker has its own folder: numba does not expect that two processes write into one at the same time. The process
# that starts the workers hands its environment to them, so that one folder, if it was not set before, is replaced.
CACHE = Path(tempfile.gettempdir(), f"scgen-kernels-{VERSION}")
if os.environ.setdefault("NUMBA_CACHE_DIR", str(CACHE)) == str(CACHE) and WORKER:
    os.environ["NUMBA_CACHE_DIR"] = str(CACHE / WORKER)
if WORKER:
    import numba  # after the variable is set

    # When numba starts its threads, as for UMAP, it sets the number of torch's threads as well.
    numba.set_num_threads(1)
    torch.set_num_threads(1)


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


@pytest.fixture(scope="module")
def several_threads() -> Iterator[None]:
    """Compute with as many threads as there are processors, also in a worker of pytest-xdist, which has one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, threads._n_processors()))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start processes that signals end, and end those that a test that failed has left."""
    children = []

    def default() -> None:
        """Undo what was ignored where the tests were started, as ``nohup`` and a shell's ``&`` make it."""
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    def start(command: list[str], **options) -> subprocess.Popen:
        children.append(subprocess.Popen(command, text=True, preexec_fn=default, **options))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.wait()
