"""The command as a shell user meets it."""

import os
import resource
import signal
import subprocess
import sys
import time

import anndata
import numpy as np
import pytest

import scgen

SCGEN = [sys.executable, "-m", "scgen.cli"]


def run(*args, **options):
    return subprocess.run([*SCGEN, *map(str, args)], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "in.h5ad"
    adata = scgen.simulate_cells(n_cells=150, n_genes=40, n_batches=2, seed=5)
    x = adata.X.toarray()
    x[4] = 0
    adata.X = x
    adata.write_h5ad(path)
    return path


def test_integrate(source, tmp_path):
    before = source.read_bytes()
    out, report = tmp_path / "out.h5ad", tmp_path / "report"
    done = run("integrate", source, "-o", out, "--batch-key", "batch", "--labels-key", "cell_type", "--n-top-genes", 20,
               "--report", report, "--max-epochs", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert source.read_bytes() == before
    result = anndata.read_h5ad(out)
    assert result.shape == (150, 40)
    assert np.flatnonzero(np.isnan(result.obsm["X_scgen"]).any(axis=1)).tolist() == [4]
    assert {"X_scgen", "X_umap_scgen"} <= set(result.obsm)
    assert result.obs["leiden_scgen"].isna().sum() == 1
    assert "cell_5" in done.stderr
    assert (report / "umap.png").stat().st_size > 10_000
    assert (report / "training.png").stat().st_size > 5_000
    assert scgen.SCVI.load(report / "model").registry.batches == ["batch_1", "batch_2"]
    assert "total" in done.stdout or "scib-metrics" in done.stdout
    again = run("integrate", source, "-o", out, "--batch-key", "batch", "--report", report)
    assert again.returncode == 1
    assert "--overwrite" in again.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["integrate", "nothing.h5ad", "-o", "out.h5ad", "--batch-key", "batch"], 1, "is not there"),
        (["integrate", "{text}", "-o", "out.h5ad", "--batch-key", "batch"], 1, "no h5ad file"),
        (["integrate", "{source}", "-o", "out.h5ad", "--batch-key", "bach"], 1, 'batch_key="batch"'),
        (
            ["integrate", "{source}", "-o", "out.h5ad", "--batch-key", "batch", "--labels-key", "celltype"],
            1,
            "cell_type",
        ),
        (["integrate", "{source}", "-o", "{source}", "--batch-key", "batch", "--overwrite"], 1, "never overwritten"),
        (["integrate", "{source}", "-o", "no/such/folder/out.h5ad", "--batch-key", "batch"], 1, "does not exist"),
        (["integrate", "{source}", "-o", "out.h5ad"], 2, "--batch-key"),
        (["integrate", "{source}", "-o", "out.h5ad", "--batch-key", "batch", "--layer", "counts"], 1, "no layer"),
        (["frobnicate"], 2, "invalid choice"),
        ([], 2, "required"),
        (["simulate", "-o", "{source}"], 1, "--overwrite"),
        (["simulate", "-o", "out.h5ad", "--n-cells", "0"], 1, "n_cells=0"),
    ],
)
def test_errors_are_one_line(source, tmp_path, args, code, words):
    text = tmp_path / "text.h5ad"
    text.write_text("no hdf5")
    before = source.read_bytes()
    done = run(*(arg.format(source=source, text=text) for arg in args), cwd=tmp_path)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert code == 2 or done.stderr.strip().count("\n") == 0, done.stderr
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.h5ad"]


def test_a_truncated_file_is_an_error(source, tmp_path):
    (tmp_path / "cut.h5ad").write_bytes(source.read_bytes()[:5000])
    done = run("check", tmp_path / "cut.h5ad")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_check(source, tmp_path):
    done = run("check", source, "--batch-key", "batch")
    assert done.returncode == 1
    assert "1 cells have no counts" in done.stdout
    assert run("simulate", "-o", tmp_path / "good.h5ad", "--n-cells", 60, "--n-genes", 20).returncode == 0
    done = run("check", tmp_path / "good.h5ad")
    assert (done.returncode, done.stdout) == (0, "nothing to say: scgen can read this file as it is.\n")


def test_help_and_version():
    assert "integrate" in run("--help").stdout
    assert scgen.__version__ in run("--version").stdout


def test_a_broken_pipe_is_quiet(source):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*SCGEN, "check", source, "--batch-key", "batch"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


def test_a_full_disk_leaves_no_half_file(tmp_path):
    # A limit on the size of files stands for the full disk; Python turns its signal into an OSError.
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run("simulate", "-o", tmp_path / "out.h5ad", "--n-cells", 500, "--n-genes", 200, preexec_fn=limit)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_interrupted_or_killed_the_old_output_stays(source, tmp_path, sent, code):
    out = tmp_path / "out.h5ad"
    out.write_bytes(b"what was there before")
    args = ["integrate", source, "-o", out, "--batch-key", "batch", "--overwrite", "--max-epochs", "100000"]
    child = subprocess.Popen([*SCGEN, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "150 cells" in child.stdout.readline()
    time.sleep(3)
    child.send_signal(sent)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in errors
    assert out.read_bytes() == b"what was there before"


def test_killed_while_writing_leaves_old_or_new(tmp_path):
    out = tmp_path / "out.h5ad"
    assert run("simulate", "-o", out, "--n-cells", 50, "--n-genes", 20).returncode == 0
    code = f"""
import scgen
from pathlib import Path
from scgen.cli import _write
adata = scgen.simulate_cells(n_cells=400, n_genes=200)
print("ready", flush=True)
while True:
    _write(adata, Path({str(out)!r}))
"""
    for delay in (0.01, 0.05, 0.13, 0.2, 0.31):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        time.sleep(delay)
        child.kill()
        child.wait()
        assert anndata.read_h5ad(out).n_obs in (50, 400)
