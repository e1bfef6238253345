"""The command as a shell user meets it."""

import argparse
import dataclasses
import errno
import inspect
import io
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import anndata
import anndata.io
import matplotlib.image
import numpy as np
import pandas as pd
import pytest

import scgen
from scgen import cli
from scgen.command import flags, h5ad, readers, streams
from scgen.command.parser import parser
from scgen.models.scvi import CHOICES

SCGEN = [sys.executable, "-m", "scgen.cli"]
# The copy of the package that is tested, and not one that is installed.
ROOT = {"PYTHONPATH": str(Path(scgen.__file__).parents[1])}


def run(*args, **options):
    return subprocess.run([*SCGEN, *map(str, args)], capture_output=True, text=True, **options)


@pytest.fixture
def here(capsys):
    """Run the command in this process, which has compiled what UMAP needs; return its exit code and what it says."""

    def run_here(*args):
        code = cli.main([*map(str, args)])
        said = capsys.readouterr()
        return subprocess.CompletedProcess(args, code, said.out, said.err)

    return run_here


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "in.h5ad"
    adata = scgen.simulate_cells(n_cells=150, n_genes=40, n_batches=2, seed=5)
    x = adata.X.toarray()
    x[4] = 0
    adata.X = x
    adata.write_h5ad(path)
    return path


def test_integrate(source, tmp_path, here):
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
    for name in ("umap.png", "training.png"):
        assert matplotlib.image.imread(report / name).std() > 0.01
    assert (report / "scores.csv").exists() == (report / "scores.png").exists() == ("total" in done.stdout)
    assert scgen.SCVI.load(report / "model").registry.batches == ["batch_1", "batch_2"]
    assert "total" in done.stdout or "scib-metrics" in done.stdout
    again = here("integrate", source, "-o", out, "--batch-key", "batch", "--report", report)
    assert again.returncode == 1
    assert "--overwrite" in again.stderr
    # Scores of the earlier run, which had labels, do not stay beside a model that they are not of.
    (report / "scores.csv").touch()
    (report / "scores.png").touch()
    once_more = here("integrate", source, "-o", out, "--batch-key", "batch", "--report", report, "--max-epochs", 1,
                    "--overwrite")  # fmt: skip
    assert once_more.returncode == 0, once_more.stderr
    assert not list(report.glob("scores.*"))


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["integrate", "nothing.h5ad", "-o", "out.h5ad", "--batch-key", "batch"], 1, "is not there"),
        (["integrate", "{text}", "-o", "out.h5ad", "--batch-key", "batch"], 1, "not an HDF5 file"),
        (["integrate", "{source}", "-o", "out.h5ad", "--batch-key", "bach"], 1, "--batch-key batch?"),
        (
            ["integrate", "{source}", "-o", "out.h5ad", "--batch-key", "batch", "--labels-key", "celltype"],
            1,
            "cell_type",
        ),
        (["integrate", "{source}", "-o", "{source}", "--batch-key", "batch", "--overwrite"], 1, "never overwritten"),
        (["integrate", "{source}", "-o", "no/such/folder/out.h5ad", "--batch-key", "batch"], 1, "does not exist"),
        (["integrate", "{source}", "-o", "out.h5ad"], 2, "--batch-key"),
        (["integrate", "{source}", "-o", "out.h5ad", "--batch-key", "batch", "--layer", "counts"], 1, "not a layer"),
        (
            ["integrate", "{source}", "-o", "out.h5ad", "--batch-key", "batch", "--report", "out.h5ad/r"],
            1,
            "another --report",
        ),
        (["integrate", "{source}", "-o", "", "--batch-key", "batch"], 2, "it is empty"),
        (["integrate", "", "-o", "out.h5ad", "--batch-key", "batch"], 2, "it is empty"),
        (["integrate", "{source}", "-o", "out.h5ad", "--batch-key", "batch", "--report", ""], 2, "it is empty"),
        (["integrate", "{source}", "-o", "out.h5ad", "--batch-key", "batch", "--suffix", "a/b"], 2, "--suffix"),
        (
            ["integrate", "{source}", "-o", "out.h5ad", "--batch-key", "batch", "--tune", "--n-latent", "4"],
            1,
            "leave --n-latent out",
        ),
        (["simulate", "-o", ""], 2, "it is empty"),
        (["convert", "{source}", "-o", ""], 2, "it is empty"),
        (["frobnicate"], 2, "invalid choice"),
        ([], 2, "required"),
        (["simulate", "-o", "{source}"], 1, "--overwrite"),
        (["simulate", "-o", "out.h5ad", "--n-cells", "0"], 2, "--n-cells"),
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
    assert "1 cell has no counts" in done.stdout
    assert done.stdout.endswith("NOT OK: 1 error; scgen cannot use this file as it is.\n")
    assert run("simulate", "-o", tmp_path / "good.h5ad", "--n-cells", 60, "--n-genes", 20).returncode == 0
    done = run("check", tmp_path / "good.h5ad", "--batch-key", "batch")
    assert (done.returncode, done.stdout) == (0, "OK: 3 batches, 60 cells, 20 genes, raw counts in X.\n")


def test_check_advises():
    adata = scgen.simulate_cells(n_cells=60, n_genes=20, n_batches=2, seed=0)
    batch = adata.obs["batch"].cat.codes.to_numpy()
    adata.obs["weeks"] = np.where(batch == 0, 3, 17)  # the batch gives it, of which its names alone say nothing
    adata.obs["age"] = np.random.default_rng(0).normal(size=60)
    table = scgen.check(adata, batch_key="batch", continuous_covariate_keys=["weeks"])
    assert table["finding"].tolist() == ["the design matrix of batch, weeks has rank 2; full rank is 3"]
    assert scgen.check(adata, batch_key="batch", continuous_covariate_keys=["age"]).empty
    table = scgen.check(adata, batch_key="batch", categorical_covariate_keys=["age"])
    assert table["suggestion"].tolist() == ['They are numbers: pass continuous_covariate_keys=["age"].']
    many = scgen.simulate_cells(n_cells=60, n_genes=6000, n_batches=2, seed=0)
    many.X[:, 0] = 1  # no cell is empty
    table = scgen.check(many, batch_key="batch")
    assert table["finding"].tolist() == ["there are more genes (6,000) than cells (60)"]
    assert scgen.check(many[:, :4000].copy(), batch_key="batch").empty


def test_help_and_version():
    assert "integrate" in run("--help").stdout
    assert scgen.__version__ in run("--version").stdout
    text = run("integrate", "--help").stdout
    assert "usage: scgen integrate IN [IN ...] -o OUT.h5ad --batch-key COLUMN [options]" in text
    assert "example:\n  scgen integrate cells.h5ad -o" in text


def test_every_argument_has_a_help():
    whole = parser(cli.COMMANDS)
    (commands,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        for action in command._actions:
            assert action.help, f"{name}: {action.dest}"


@pytest.mark.parametrize(("function", "texts"), [(scgen.SCVI, flags.MODEL), (scgen.SCVI.train, flags.TRAINING)])
def test_defaults_in_the_help_are_those_of_the_functions(function, texts):
    defaults = {name: of.default for name, of in inspect.signature(function).parameters.items()}
    assert texts.keys() == defaults.keys() - {"self", "adata", "seed", "progress", "on_epoch"}
    for name, text in texts.items():
        # What None stands for is said in words.
        default = {"True": "yes", "False": "no"}.get(str(defaults[name]), defaults[name])
        wanted = "(default: " if default is None else f"(default {default})"
        assert wanted in text, name


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ('Say so: setup_anndata(adata, layer="counts").', "Say so: --layer counts."),
        ('batch_key="bach" is no column; Did you mean setup_anndata(adata, batch_key="batch")?',
         "--batch-key bach is no column; Did you mean --batch-key batch?"),
        ('pass continuous_covariate_keys=["a b"].', "pass --continuous-covariate 'a b'."),
        ('setup_anndata(adata, categorical_covariate_keys=["a"])', "--covariate a"),
        ("train_size=1.5; it takes a share", "--train-size 1.5; it takes a share"),
        ("learning_rate=-1e-05.", "--learning-rate -1e-05."),
        ("counts=False and early_stopping=True", "--no-counts and --early-stopping"),
        ("early_stopping=False", "--no-early-stopping"),
        ("needs labels: setup_anndata(adata, labels_key=...).", "needs labels: --labels-key ...."),
        ("n_top_genes chooses genes", "--n-top-genes chooses genes"),
        ('adata.obs["n_latent"] and the layer are left', 'adata.obs["n_latent"] and the layer are left'),
        ("batch_keys, my_batch_key and n_obs=5", "batch_keys, my_batch_key and n_obs=5"),
        ('batch_key="my batch" is no column', "--batch-key 'my batch' is no column"),
        ("runs/n_latent=20/a.h5ad is not there", "runs/n_latent=20/a.h5ad is not there"),
        ("runs/batch_key/a.h5ad is not there", "runs/batch_key/a.h5ad is not there"),
        ("there is no such column (it has: batch_key, layer)", "there is no such column (it has: batch_key, layer)"),
        ("Leave layer out to read adata.X.", "Leave --layer out to read adata.X."),
    ],
)  # fmt: skip
def test_messages_name_flags(message, wanted):
    (commands,) = (action for action in parser(cli.COMMANDS)._actions if isinstance(action, argparse._SubParsersAction))
    assert flags.in_flags(message, commands.choices["integrate"]) == wanted


def test_a_signal_that_was_swallowed_ends_the_command_all_the_same(tmp_path, monkeypatch, capfd):
    """As where it comes while a compiled library calls Python: what a handler raises is then printed and forgotten."""
    adata = scgen.simulate_cells(n_cells=60, n_genes=20, n_batches=2, seed=0)
    adata.write_h5ad(tmp_path / "in.h5ad")

    class Swallowing:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    from scgen.workflows import clustering

    original = clustering.cluster

    def interrupted(*args, **options):
        original(*args, **options)
        thing = Swallowing()
        del thing

    monkeypatch.setattr(clustering, "cluster", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" makes the tests ignore it
    with pytest.raises(SystemExit) as ended:
        cli.main(["integrate", str(tmp_path / "in.h5ad"), "-o", str(tmp_path / "out.h5ad"), "--batch-key", "batch",
                  "--max-epochs", "1", "--quiet"])  # fmt: skip
    signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert "scgen: interrupted; nothing was written" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


def test_outputs_within_a_zarr_input(tmp_path):
    scgen.simulate_cells(n_cells=60, n_genes=20, n_batches=2, seed=0).write_zarr(tmp_path / "in.zarr")
    for places in (["-o", "in.zarr/out.h5ad"], ["-o", "out.h5ad", "--report", "in.zarr/report"]):
        done = run("integrate", "in.zarr", *places, "--batch-key", "batch", cwd=tmp_path)
        assert done.returncode == 1
        assert "is inside the input in.zarr, which is never changed" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.zarr"]


def test_one_gene_is_reported(source, tmp_path, here):
    done = here("integrate", source, "-o", tmp_path / "out.h5ad", "--batch-key", "batch", "--n-top-genes", 1,
               "--max-epochs", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out_report" / "umap.png").exists()


def test_one_batch_and_another_ending(source, tmp_path, here):
    adata = anndata.read_h5ad(source)
    adata.obs["one"] = "all"
    adata.write_h5ad(tmp_path / "in.h5ad")
    done = here("integrate", tmp_path / "in.h5ad", "-o", tmp_path / "out.h5", "--batch-key", "one", "--max-epochs", 1)
    assert done.returncode == 0, done.stderr
    assert 'adata.obs["one"] has one value (all) for all cells. There is nothing to integrate.' in done.stderr
    assert "out.h5 does not end in .h5ad, but is written in this format" in done.stdout
    assert "X_scgen" in anndata.read_h5ad(tmp_path / "out.h5").obsm
    # What takes long is said before it begins.
    said = [line for line in done.stdout.splitlines() if line.endswith("...")]
    assert [line.partition(" ")[0] for line in said] == ["computing", "drawing"]


def test_a_broken_pipe_is_quiet(source):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*SCGEN, "check", source, "--batch-key", "batch"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


def test_nobody_reads_on_and_the_files_are_written(source, tmp_path):
    """As in ``scgen integrate ... 2>&1 | head -1``: warnings and the progress line have nowhere to go."""
    reader, writer = os.pipe()
    os.close(reader)
    out = tmp_path / "out.h5ad"
    # One cell has no counts, and so there is a warning.
    command = [*SCGEN, "integrate", source, "-o", out, "--batch-key", "batch", "--max-epochs", 2]
    done = subprocess.run(list(map(str, command)), stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 0
    assert "leiden_scgen" in anndata.read_h5ad(out).obs
    assert (tmp_path / "out_report" / "umap.png").exists()


@pytest.mark.parametrize("error", [BrokenPipeError, OSError(errno.EIO, "gone"), OSError(errno.ENOSPC, "full")])
def test_a_stream_that_cannot_be_written_to_is_silent(error):
    class Broken(io.StringIO):
        def write(self, text):
            raise error

        def flush(self):
            raise error

    print("a line", file=streams.Lasting(Broken()), flush=True)


def test_two_commands_with_one_output(source, tmp_path, monkeypatch, capsys):
    """The other one ends first: what it wrote stays, and what this one made is kept."""
    out, report = tmp_path / "out.h5ad", tmp_path / "out_report"
    call = ["integrate", str(source), "-o", str(out), "--batch-key", "batch", "--max-epochs", "1", "--quiet"]
    real = cli.h5ad.write

    def write(adata, path, overwrite):
        monkeypatch.setattr(cli.h5ad, "write", real)
        assert cli.main(call) == 0
        (report / "scores.csv").write_text("the other's")
        real(adata, path, overwrite)

    monkeypatch.setattr(cli.h5ad, "write", write)
    assert cli.main(call) == 1
    (kept,) = tmp_path.glob("out-*.h5ad")
    assert str(kept) in capsys.readouterr().err
    assert "X_scgen" in anndata.read_h5ad(kept).obsm
    assert "X_scgen" in anndata.read_h5ad(out).obsm
    assert (report / "scores.csv").read_text() == "the other's"
    assert scgen.SCVI.load(report / "model").is_trained


def test_an_output_that_is_a_link_to_nowhere(source, tmp_path):
    out = tmp_path / "out.h5ad"
    out.symlink_to(tmp_path / "nowhere.h5ad")
    done = run("simulate", "-o", out, "--n-cells", 60, "--n-genes", 20)
    assert done.returncode == 1
    assert "--overwrite" in done.stderr
    assert run("simulate", "-o", out, "--n-cells", 60, "--n-genes", 20, "--overwrite").returncode == 0
    assert anndata.read_h5ad(out).shape == (60, 20)


def test_choices_are_those_of_the_model(source, tmp_path):
    assert flags.CHOICES == CHOICES
    done = run("integrate", source, "-o", tmp_path / "out.h5ad", "--batch-key", "batch", "--prior", "nonsense")
    assert done.returncode == 2
    assert "vamp" in done.stderr


def test_an_output_made_meanwhile_is_left_and_the_result_kept(tmp_path):
    adata = scgen.simulate_cells(n_cells=60, n_genes=20, seed=0)
    out = tmp_path / "out.h5ad"
    out.write_text("another's")
    with pytest.raises(FileExistsError, match="made by another program meanwhile") as told:
        h5ad.write(adata, out, overwrite=False)
    assert out.read_text() == "another's"
    (other,) = set(tmp_path.iterdir()) - {out}
    assert str(other) in str(told.value)
    np.testing.assert_array_equal(anndata.read_h5ad(other).X.toarray(), adata.X.toarray())
    h5ad.write(adata, out, overwrite=True)
    assert anndata.read_h5ad(out).shape == (60, 20)


def test_a_long_reason_why_nothing_was_written(tmp_path, monkeypatch):
    """It is longer than what a pipe holds."""

    def fail(*_, **__):
        raise ValueError("reason " * 100_000)

    monkeypatch.setattr(anndata.io, "write_h5ad", fail)
    with pytest.raises(OSError, match="reason") as told:
        h5ad.write(scgen.simulate_cells(n_cells=60, n_genes=20, seed=0), tmp_path / "out.h5ad", overwrite=False)
    assert len(str(told.value)) > 700_000
    assert list(tmp_path.iterdir()) == []


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
def test_interrupted_or_killed_the_old_output_stays(source, tmp_path, sent, code, start):
    out = tmp_path / "out.h5ad"
    out.write_bytes(b"what was there before")
    args = ["integrate", source, "-o", out, "--batch-key", "batch", "--overwrite", "--max-epochs", "100000"]
    child = start([*SCGEN, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert "150 cells" in child.stdout.readline()
    time.sleep(3)
    child.send_signal(sent)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in errors
    assert (code < 0) or "interrupted; nothing was written" in errors
    assert out.read_bytes() == b"what was there before"


def test_killed_while_writing_leaves_old_or_new(tmp_path, start):
    out = tmp_path / "out.h5ad"
    assert run("simulate", "-o", out, "--n-cells", 50, "--n-genes", 20).returncode == 0
    code = f"""
import scgen
from pathlib import Path
from scgen.command.h5ad import write
adata = scgen.simulate_cells(n_cells=400, n_genes=200)
print("ready", flush=True)
while True:
    write(adata, Path({str(out)!r}), overwrite=True)
"""
    for delay in (0.01, 0.05, 0.13, 0.2, 0.31):
        child = start([sys.executable, "-c", code], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(delay)
        assert child.poll() is None
        child.kill()
        child.wait()
        assert anndata.read_h5ad(out).n_obs in (50, 400)


def test_nothing_of_the_input_is_overwritten_in_the_output(source, tmp_path, here):
    adata = anndata.read_h5ad(source)
    adata.obs["leiden_scgen"] = adata.obs["batch"].astype(str) + "_mine"
    adata.obsm["X_umap_scgen"] = np.ones((150, 2))
    adata.write_h5ad(tmp_path / "in.h5ad")
    call = ["integrate", tmp_path / "in.h5ad", "-o", tmp_path / "out.h5ad", "--batch-key", "leiden_scgen"]
    done = here(*call)
    assert done.returncode == 1
    assert 'obs["leiden_scgen"], obsm["X_umap_scgen"]' in done.stderr
    assert "--suffix" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]
    done = here(*call, "--suffix", "two", "--max-epochs", 1)
    assert done.returncode == 0, done.stderr
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert out.obs["leiden_scgen"].tolist() == adata.obs["leiden_scgen"].tolist()
    np.testing.assert_array_equal(out.obsm["X_umap_scgen"], adata.obsm["X_umap_scgen"])
    assert {"X_two", "X_umap_two"} <= set(out.obsm)
    assert "leiden_two" in out.obs
    again = here(
        "integrate", tmp_path / "out.h5ad", "-o", tmp_path / "b.h5ad", "--batch-key", "batch", "--suffix", "two"
    )
    assert again.returncode == 1
    assert 'obsm["X_two"]' in again.stderr


def test_what_was_read_is_written_as_it_was(tmp_path, here):
    # Nullable strings, in columns and names, which anndata writes only where it is asked to; and text that is text.
    adata = scgen.simulate_cells(n_cells=60, n_genes=20, n_batches=2, seed=5)
    adata.obs["nullable"] = pd.array(["a", None, "b"] * 20, dtype="string")
    adata.obs["sample"] = pd.array(["s1", "s2"] * 30, dtype="string")
    adata.obs["text"] = pd.Series(["x", "y", "z"] * 20, index=adata.obs_names, dtype=object)
    adata.var["symbol"] = pd.array(["g", None] * 10, dtype="string")
    adata.obs.index, adata.var.index = (pd.Index(names, dtype="string") for names in (adata.obs_names, adata.var_names))
    adata.uns["mine"] = {"nested": pd.array(["a", None], dtype="string"), "none": None}
    with anndata.settings.override(allow_write_nullable_strings=True):
        anndata.io.write_h5ad(tmp_path / "in.h5ad", adata, convert_strings_to_categoricals=False)
    before = anndata.read_h5ad(tmp_path / "in.h5ad")
    assert isinstance(before.obs["nullable"].dtype, pd.StringDtype)  # else nothing is tested
    done = here("integrate", tmp_path / "in.h5ad", "-o", tmp_path / "out.h5ad", "--batch-key", "sample",
                "--max-epochs", 1, "--quiet")  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = anndata.read_h5ad(tmp_path / "out.h5ad")
    pd.testing.assert_frame_equal(after.obs[before.obs.columns], before.obs)
    pd.testing.assert_frame_equal(after.var, before.var)
    assert after.uns["mine"]["nested"].isna().tolist() == [False, True]


@pytest.mark.parametrize("part", ["obs", "uns", "obsm"])
def test_what_cannot_be_written_is_said_before_training(tmp_path, monkeypatch, capsys, part):
    adata = scgen.simulate_cells(n_cells=60, n_genes=20, seed=5)
    if part == "obs":
        adata.obs["mine"] = pd.Series([1, "a", 2.5] * 20, index=adata.obs_names, dtype=object)
    elif part == "uns":
        adata.uns["mine"] = object()
    else:
        adata.obsm["mine"] = pd.DataFrame({"mine": pd.Series([{}] * 60, dtype=object)}).set_axis(adata.obs_names)
    (tmp_path / "in.h5ad").write_text("")
    monkeypatch.setattr(readers, "read", lambda path: adata)
    monkeypatch.setattr(scgen.SCVI, "train", lambda *_, **__: pytest.fail("trained"))
    handlers, show = [signal.getsignal(number) for number in h5ad.ENDING], warnings.showwarning
    code = cli.main(["integrate", str(tmp_path / "in.h5ad"), "-o", str(tmp_path / "out.h5ad"), "--batch-key", "batch"])
    assert code == 1
    # Nothing of the process stays changed, where the command is called from Python.
    assert [signal.getsignal(number) for number in h5ad.ENDING] == handlers
    assert warnings.showwarning is show
    assert "could not be written" in (told := capsys.readouterr().err)
    assert "mine" in told
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_ended_while_writing_it_leaves_nothing(tmp_path, sent, code, start):
    # What is written is begun, and never ends.
    slow = """
import sys, time
import anndata.io
from scgen.cli import main

def write_h5ad(path, *_, **__):
    with open(path, "w") as file:
        file.write("half")
        file.flush()
        time.sleep(100)

anndata.AnnData.write_h5ad = lambda self, path: write_h5ad(path)
anndata.io.write_h5ad = write_h5ad
sys.exit(main(["simulate", "-o", "out.h5ad", "--n-cells", "60", "--n-genes", "20"]))
"""
    command = [sys.executable, "-c", slow]
    child = start(command, cwd=tmp_path, stderr=subprocess.PIPE, env=os.environ | ROOT)
    for _ in range(1800):
        if any(path.stat().st_size for path in tmp_path.glob(".*.partial")):
            break
        time.sleep(0.1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["half"]
    child.send_signal(getattr(signal, sent))
    _, errors = child.communicate(timeout=20)
    assert child.returncode == code
    assert errors == "scgen: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_what_nohup_ignores_stays_ignored(tmp_path):
    code = """
import os, signal, sys
from scgen import cli
cli.COMMANDS["simulate"] = lambda args: (os.kill(os.getpid(), signal.SIGHUP), print("went on"), 0)[-1]
sys.exit(cli.main(["simulate", "-o", "out.h5ad"]))
"""

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ROOT, preexec_fn=ignore)
    assert (done.returncode, done.stdout) == (0, "went on\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(source, tmp_path, closed):
    call = shlex.join(map(str, [*SCGEN, "check", source, "--batch-key", "batch"]))
    done = subprocess.run(["sh", "-c", f"exec {call} {closed}"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    # What is told on stderr does not go to stdout instead.
    call = shlex.join([*SCGEN, "check", "nothing.h5ad"])
    done = subprocess.run(["sh", "-c", f"exec {call} {closed}"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert ("is not there" in done.stderr) == ("2>&-" not in closed)


def test_closed_streams_do_not_reach_the_files(source, tmp_path):
    call = [*SCGEN, "integrate", source, "-o", "out.h5ad", "--batch-key", "batch", "--max-epochs", 1]
    done = subprocess.run(["sh", "-c", f"exec {shlex.join(map(str, call))} >&- 2>&- <&-"], cwd=tmp_path)
    assert done.returncode == 0
    assert "X_scgen" in anndata.read_h5ad(tmp_path / "out.h5ad").obsm


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_output_to_a_full_disk(source):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*SCGEN, "check", source], stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr == "scgen: error: [Errno 28] No space left on device\n"
        done = subprocess.run([*SCGEN, "check", "nothing.h5ad"], stdout=subprocess.PIPE, stderr=full, text=True)
        assert (done.returncode, done.stdout) == (1, "")


def options(command):
    """Return the options of a command, by the names that they have for it."""
    (commands,) = (action for action in parser(cli.COMMANDS)._actions if isinstance(action, argparse._SubParsersAction))
    return {action.dest: action for action in commands.choices[command]._actions if action.dest != "help"}


def test_integrate_takes_all_that_the_function_takes():
    # The embedding's key comes from --suffix, and --quiet is the opposite of progress.
    wanted = inspect.signature(scgen.integrate).parameters.keys() - {"adata", "key", "adjusted_basis", "progress"}
    assert wanted <= options("integrate").keys()


def test_check_takes_the_same_data():
    checked, integrated = options("check"), options("integrate")
    positions = {"spatial_key", "section_key"}  # for models that the command does not have
    assert inspect.signature(scgen.check).parameters.keys() - {"adata"} - positions <= checked.keys()
    for name, option in checked.items():
        assert integrated[name].option_strings == option.option_strings
        assert (integrated[name].metavar, integrated[name].help) == (option.metavar, option.help)


def test_options_reach_the_model(tmp_path, here):
    adata = scgen.simulate_cells(n_cells=120, n_genes=20, n_batches=2, n_types=2, seed=5)
    rng = np.random.default_rng(0)
    adata.obs["donor"], adata.obs["age"] = rng.choice(["a", "b"], 120), rng.normal(size=120)
    adata.obs["size"] = rng.uniform(1, 2, 120)
    adata.layers["counts"], adata.X = adata.X, None
    adata.write_h5ad(tmp_path / "in.h5ad")
    data = ["--batch-key", "batch", "--labels-key", "cell_type", "--layer", "counts", "--covariate", "donor",
            "--continuous-covariate", "age", "--size-factor-key", "size"]  # fmt: skip
    done = here("check", tmp_path / "in.h5ad", *data)
    assert done.returncode == 0, done.stdout + done.stderr
    done = here("integrate", tmp_path / "in.h5ad", "-o", tmp_path / "out.h5ad", *data, "--report", tmp_path / "report",
               "--n-latent", 3, "--n-hidden", 16, "--prior", "mog", "--n-components", 4, "--posterior", "planar",
               "--dispersion", "gene-label", "--gene-likelihood", "nb", "--no-encode-covariates", "--kl-start", 2,
               "--batch-penalty", 5, "--max-epochs", 2, "--batch-size", 32, "--train-size", 0.8,
               "--no-early-stopping")  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = scgen.SCVI.load(tmp_path / "report" / "model", anndata.read_h5ad(tmp_path / "out.h5ad"))
    wanted = {"n_latent": 3, "n_hidden": 16, "prior": "mog", "n_components": 4, "posterior": "planar", "n_layers": 1,
              "dispersion": "gene-label", "gene_likelihood": "nb", "encode_covariates": False}  # fmt: skip
    assert wanted.items() <= dataclasses.asdict(model.arguments).items()
    training = {"max_epochs": 2, "batch_size": 32, "kl_start": 2.0, "batch_penalty": 5.0, "early_stopping": False}
    assert training.items() <= model.trainings[0].items()
    assert len(model.train_indices) == 96
    assert (model.registry.n_categories, list(model.registry.scaling)) == ([2, 2], ["age"])
    assert (model.registry.setup.size_factor_key, model.registry.setup.layer) == ("size", "counts")
    assert model.registry.labels == ["type_1", "type_2"]
