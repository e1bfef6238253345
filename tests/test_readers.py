"""Files of cells in other formats than h5ad: each is written here as its own documentation describes it."""

import gzip
import importlib.util
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from scipy import io, sparse

import scgen
from scgen import cli
from scgen.command import readers

COUNTS = np.random.default_rng(0).poisson(1.0, (30, 6))
CELLS = [f"AAAC{i}-1" for i in range(30)]
IDS = [f"ENSG{i}" for i in range(6)]
SYMBOLS = ["CD3E", "MS4A1", "NKG7", "GNLY", "LYZ", "LYZ"]
UNIQUE = [*SYMBOLS[:5], "LYZ-1"]


def write_10x(path, version=3, counts=COUNTS, cells=CELLS):
    matrix = sparse.csr_matrix(counts)  # a column of the genes x cells matrix in CSC form is a cell
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        for name, values in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
            group[name] = values
        group["shape"], group["barcodes"] = np.array(counts.shape[::-1]), np.array(cells, "S")
        if version == 2:
            group["genes"], group["gene_names"] = np.array(IDS, "S"), np.array(SYMBOLS, "S")
            return path
        features = group.create_group("features")
        features["id"], features["name"] = np.array(IDS, "S"), np.array(SYMBOLS, "S")
        features["feature_type"] = np.array(["Gene Expression"] * 6, "S")
        features["genome"] = np.array(["GRCh38"] * 6, "S")
    return path


def write_mtx(folder, prefix="", compressed=True, genes="features.tsv"):
    folder.mkdir()
    io.mmwrite(folder / "plain.mtx", sparse.csr_matrix(COUNTS.T))
    tables = {
        f"{prefix}matrix.mtx": (folder / "plain.mtx").read_bytes(),
        f"{prefix}barcodes.tsv": "".join(f"{cell}\n" for cell in CELLS).encode(),
        f"{prefix}{genes}": "".join(
            "\t".join([one, other, *(["Gene Expression"] if genes == "features.tsv" else [])]) + "\n"
            for one, other in zip(IDS, SYMBOLS, strict=True)
        ).encode(),
    }
    (folder / "plain.mtx").unlink()
    for name, content in tables.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def is_what_was_written(adata):
    assert adata.obs_names.tolist() == CELLS
    assert adata.var_names.tolist() == UNIQUE
    assert adata.var["gene_ids"].tolist() == IDS
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)


@pytest.mark.parametrize("version", [2, 3])
def test_10x_h5(tmp_path, version):
    with pytest.warns(UserWarning, match="1 gene name occurs more than once"):
        is_what_was_written(readers.read(write_10x(tmp_path / "cells.h5", version)))


@pytest.mark.parametrize("how", [{}, {"prefix": "GSM1_"}, {"compressed": False, "genes": "genes.tsv"}])
def test_10x_mtx(tmp_path, how):
    with pytest.warns(UserWarning, match="1 gene name occurs more than once"):
        is_what_was_written(readers.read(write_mtx(tmp_path / "cells", **how)))


def test_mtx_as_starsolo_writes_it(tmp_path):
    import inspect

    import scanpy as sc

    folder = write_mtx(tmp_path / "cells", compressed=False)
    if "compressed" in inspect.signature(sc.read_10x_mtx).parameters:
        is_what_was_written(readers.read(folder))
    else:
        with pytest.raises(ValueError, match=r"from version 1\.12 on.*gzip"):
            readers.read(folder)


def test_zarr_and_h5ad_stay_as_they_are(tmp_path):
    adata = anndata.AnnData(sparse.csr_matrix(COUNTS.astype(np.float32)))
    adata.obs_names, adata.var_names = CELLS, SYMBOLS
    adata.write_h5ad(tmp_path / "cells.h5")  # some name it so
    adata.write_zarr(tmp_path / "cells.zarr")
    for name in ("cells.h5", "cells.zarr"):
        read = readers.read(tmp_path / name)
        assert read.var_names.tolist() == SYMBOLS
        np.testing.assert_array_equal(read.X.toarray(), COUNTS)


def write_loom(path):
    """Write what the specification of loom 3 asks for."""
    with h5py.File(path, "w") as file:
        file["matrix"] = COUNTS.T.astype(np.float32)
        file.create_group("layers")
        text = h5py.string_dtype()
        for group, names in (("row_attrs/Gene", SYMBOLS), ("row_attrs/gene_ids", IDS), ("col_attrs/CellID", CELLS)):
            file.create_dataset(group, data=names, dtype=text)
        for group in ("attrs", "row_graphs", "col_graphs"):
            file.create_group(group)
        file["attrs"].create_dataset("LOOM_SPEC_VERSION", data="3.0.0", dtype=text)
    return path


def test_loom(tmp_path):
    path = write_loom(tmp_path / "cells.loom")
    if importlib.util.find_spec("loompy") is None:
        with pytest.raises(ImportError, match=r"cells\.loom is a loom file, which needs loompy: pip install loompy"):
            readers.read(path)
    else:
        is_what_was_written(readers.read(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("table.csv", r"scanpy\.read_csv"),
        ("table.tsv", r"scanpy\.read_csv"),
        ("cells.rds", "writeH5AD"),
        ("cells.h5mu", r"mudata\.read_h5mu"),
        ("cells.h5seurat", r"SeuratDisk::Convert"),
        ("matrix.mtx.gz", "name its folder"),
        ("notes.h5ad", "not an HDF5 file"),
        ("cells.h5", r"unknown kind \(it has: a, b\)"),
        ("modalities.h5", r"mudata\.read_h5mu"),
        ("empty", r"without a matrix\.mtx or a zarr store \(it has: nothing\)"),
        ("two", r"several matrices \(a_matrix\.mtx, b_matrix\.mtx\)"),
        ("nowhere.h5ad", r"is not there \(beside it: cells\.h5, modalities\.h5, notes\.h5ad\)"),
        ("cut.h5", "cut short"),
    ],
)
def test_what_cannot_be_read_is_told_how_to(tmp_path, name, words):
    for text in ("table.csv", "table.tsv", "cells.rds", "cells.h5mu", "cells.h5seurat", "matrix.mtx.gz", "notes.h5ad"):
        (tmp_path / text).write_text("something")
    with h5py.File(tmp_path / "cells.h5", "w") as file:
        file["b"], file["a"] = 1, 2
    with h5py.File(tmp_path / "modalities.h5", "w") as file:
        file.create_group("mod")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for one in "ab":
        (tmp_path / "two" / f"{one}_matrix.mtx").write_text("")
    if name == "cut.h5":
        (tmp_path / name).write_bytes(write_10x(tmp_path / "whole.h5").read_bytes()[:4000])
    with pytest.raises(ValueError, match=words):
        readers.read(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*gene names? occurs? more than once", "ignore:no file has the column")
def test_files_are_joined_and_are_the_batches(tmp_path):
    paths = []
    for sample in ("day1", "day2"):  # as Cell Ranger writes them
        (tmp_path / sample).mkdir()
        paths.append(write_10x(tmp_path / sample / "filtered_feature_bc_matrix.h5"))
    joined = readers.read_all(paths, "sample")
    assert joined.obs["sample"].tolist() == ["day1"] * 30 + ["day2"] * 30
    assert joined.obs_names.tolist() == [f"{cell}-{day}" for day in ("day1", "day2") for cell in CELLS]
    assert joined.var["gene_ids"].tolist() == IDS
    np.testing.assert_array_equal(joined.X.toarray(), np.vstack([COUNTS, COUNTS]))


def test_a_misspelt_column_is_told_where_several_files_are_read(tmp_path):
    paths = [write_h5ad(tmp_path / f"{name}.h5ad", ["a", "b"], sample=name) for name in ("one", "two")]
    with pytest.warns(UserWarning, match='no file has the column "smaple": the 2 files are the batches.*sample'):
        readers.read_all(paths, "smaple")


def test_text_and_numbers_are_joined_as_text(tmp_path):
    paths = [
        write_h5ad(tmp_path / "one.h5ad", ["a", "b"], batch="x"),
        write_h5ad(tmp_path / "two.h5ad", ["a", "b"], batch=2),
    ]
    joined = readers.read_all(paths, "batch")
    assert joined.obs["batch"].tolist() == ["x"] * 30 + ["2"] * 30
    joined.write_h5ad(tmp_path / "joined.h5ad")


@pytest.mark.parametrize("other", ["../cells/one.h5ad", "link.h5ad"])
def test_a_file_by_two_names_is_named_twice(tmp_path, monkeypatch, other):
    (tmp_path / "cells").mkdir()
    monkeypatch.chdir(tmp_path / "cells")
    write_h5ad(Path("one.h5ad"), ["a", "b"])
    Path("link.h5ad").symlink_to("one.h5ad")
    with pytest.raises(ValueError, match=r"a file is named twice: one\.h5ad, "):
        readers.read_all([Path("one.h5ad"), Path(other)], "sample")


def test_an_x_that_only_some_files_have(tmp_path):
    one = write_h5ad(tmp_path / "one.h5ad", ["a", "b"])
    empty = anndata.read_h5ad(one)
    empty.X = None
    empty.write_h5ad(tmp_path / "two.h5ad")
    with pytest.raises(ValueError, match=r"X is empty in some of the files.*one and two differ"):
        readers.read_all([one, tmp_path / "two.h5ad"], "sample")


def write_h5ad(path, genes, **obs):
    adata = anndata.AnnData(sparse.csr_matrix(COUNTS[:, : len(genes)].astype(np.float32)))
    adata.obs_names, adata.var_names = CELLS, genes
    for name, value in obs.items():
        adata.obs[name] = value
    adata.write_h5ad(path)
    return path


def test_a_column_that_all_files_have_is_kept(tmp_path):
    one = write_h5ad(tmp_path / "one.h5ad", ["a", "b", "c"], donor="x", batch="p")
    two = write_h5ad(tmp_path / "two.h5ad", ["c", "d", "b"], donor="y", batch="q")
    with pytest.warns(UserWarning, match="2 genes are in all files; up to 1 other is left out"):
        joined = readers.read_all([one, two], "donor")
    assert joined.obs["donor"].tolist() == ["x"] * 30 + ["y"] * 30
    assert joined.obs["batch"].tolist() == ["p"] * 30 + ["q"] * 30
    assert sorted(joined.var_names) == ["b", "c"]
    np.testing.assert_array_equal(joined[30:, "c"].X.toarray().ravel(), COUNTS[:, 0])


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([("two.h5ad", ["a", "b"], {})], 'only one of the 2 files have the column "donor"'),
        ([("two.h5ad", ["x", "y"], {"donor": "b"})], "no gene in common.*one: a, .*two: x"),
        ([("two.h5ad", ["a", "a"], {"donor": "b"})], "two has duplicate gene names"),
        ([("one.h5ad", ["a", "b"], {"donor": "b"})], "named twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*names are not unique")
def test_files_that_cannot_be_joined(tmp_path, others, words):
    paths = [write_h5ad(tmp_path / "one.h5ad", ["a", "b"], donor="a")]
    paths += [write_h5ad(tmp_path / name, genes, **obs) for name, genes, obs in others]
    with pytest.raises(ValueError, match=words):
        readers.read_all(paths, "donor")


def test_the_command_integrates_samples_of_10x(tmp_path, monkeypatch, capsys):
    adata = scgen.simulate_cells(n_cells=120, n_genes=6, n_batches=2, seed=0)
    for batch, rows in adata.obs.groupby("batch", observed=True).indices.items():
        write_10x(tmp_path / f"{batch}.h5", counts=adata.X[rows].toarray(), cells=[f"cell{i}-1" for i in rows])
    monkeypatch.chdir(tmp_path)
    files = ["batch_1.h5", "batch_2.h5", "-o", "out.h5ad", "--batch-key", "sample"]
    assert cli.main(["integrate", *files, "--max-epochs", "2", "--resolution", "0.01", "--n-top-genes", "10"]) == 0
    said = capsys.readouterr()
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert result.obs["sample"].value_counts().to_dict() == adata.obs["batch"].value_counts().to_dict()
    assert result.obs["leiden_scgen"].nunique() == 1
    assert "warning: --n-top-genes 10, but adata has 6 genes; all are modelled" in said.err
    assert "computing neighbours, UMAP and Leiden clusters" in said.out
