"""Sparse matrices whose structure does not fit their shape are refused before compiled code reads them."""

import anndata
import h5py
import numpy as np
import pytest
import zarr
from scipy import sparse

import scgen
from scgen.cli import main
from scgen.data.stores import DamagedMatrix, MemoryStore, check_structure, open_store

N, G = 60, 40


def index_of(value, step=None):
    def damage(matrix):
        matrix.indices[:: step or len(matrix.indices)] = value

    return damage


def falling(matrix):
    matrix.indptr[7] = matrix.indptr[9] + 1


def too_long(matrix):
    matrix.indptr[-1] += 5


def too_short(matrix):
    matrix.indptr[-1] = matrix.indptr[-2]


def late_start(matrix):
    matrix.indptr[0] = 1


def negative_start(matrix):
    matrix.indptr[0] = -1


def of_other_shape(matrix):
    matrix.indptr = matrix.indptr[:-3]


def fewer_indices(matrix):
    matrix.indices = matrix.indices[:-1]


def fractional_pointers(matrix):
    matrix.indptr = matrix.indptr.astype(float)


#: Each with what the message must say of it.
DAMAGES = {
    "far out": (index_of(2**30, 7), "indices has 1073741824"),
    "negative": (index_of(-5), "indices has -5"),
    "one too far": (lambda matrix: index_of(matrix.shape[matrix.format == "csr"])(matrix), " go from 0 to"),
    "falling": (falling, "indptr decreases"),
    "too long": (too_long, "it must go from 0 to"),
    "too short": (too_short, "it must go from 0 to"),
    "late start": (late_start, "indptr goes from 1"),
    "negative start": (negative_start, "indptr goes from -1"),
    "other shape": (of_other_shape, "indptr has"),
    "fewer indices": (fewer_indices, "indices has the shape"),
    "fractional pointers": (fractional_pointers, "not integers"),
}


def damaged(name, form="csr_matrix", seed=0):
    """Return cells with a damaged sparse matrix of counts, large enough for compiled kernels."""
    rng = np.random.default_rng(seed)
    adata = anndata.AnnData(np.zeros((N, G), np.float32))
    adata.obs_names = [f"cell_{i + 1}" for i in range(N)]
    adata.obs["batch"] = np.repeat(["a", "b"], N // 2)
    matrix = getattr(sparse, form)(rng.poisson(2.0, (N, G)).astype(np.float32))
    DAMAGES[name][0](matrix)
    adata.X = sparse.csr_matrix((N, G), dtype=np.float32)
    adata.layers["counts"] = matrix
    return adata


@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "csr_array"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_structure_is_refused_in_words(name, form):
    adata = damaged(name, form)
    words = DAMAGES[name][1]
    with pytest.raises(ValueError, match=f'adata.layers\\["counts"\\] is a damaged sparse matrix: .*{words}'):
        scgen.setup_anndata(adata, layer="counts", batch_key="batch")
    table = scgen.check(adata, layer="counts", batch_key="batch")
    assert table["level"].tolist() == ["error"]
    assert words in table["finding"][0]


def test_the_cell_is_named():
    adata = damaged("far out")
    adata.layers["counts"] = sparse.csr_matrix(np.ones((N, G), np.float32))
    adata.layers["counts"].indices[5 * G + 3] = G
    with pytest.raises(ValueError, match=r'indices has 40, but the columns go from 0 to 39 \(first in cell "cell_6"'):
        scgen.setup_anndata(adata, layer="counts")


@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix"])
def test_the_same_of_files(tmp_path, form, capsys):
    """Written as arrays, since anndata's own writer looks at some of it; read whole, backed, and by the command."""
    for name, (_, words) in DAMAGES.items():
        adata = damaged(name, form)
        matrix = adata.layers["counts"]
        adata.layers["counts"] = getattr(sparse, form)(np.ones((N, G), np.float32))
        path = tmp_path / f"{name}.h5ad".replace(" ", "_")
        adata.write_h5ad(path)
        with h5py.File(path, "a") as file:
            for part in ("data", "indices", "indptr"):
                del file["layers/counts"][part]
                file["layers/counts"][part] = getattr(matrix, part)
            file.copy("layers/counts", "counts")
            del file["X"]
            file.move("counts", "X")
        assert main(["check", str(path), "--batch-key", "batch"]) == 1
        assert words in capsys.readouterr().out, name
        backed = anndata.read_h5ad(path, backed="r")
        with pytest.raises(ValueError, match=f"adata.X is a damaged sparse matrix: .*{words}"):
            scgen.setup_anndata(backed, batch_key="batch")
        backed.file.close()


def test_a_file_that_is_damaged_after_its_check(tmp_path):
    """The blocks of a file are checked whenever they are read."""
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    anndata.io.write_elem(group, "X", sparse.csr_matrix(np.ones((N, G), np.float32)))
    store = open_store(anndata.io.sparse_dataset(group["X"]), np.arange(3))
    group["X"]["indices"][4 * G] = 2**30
    for read in (lambda: list(store.blocks()), lambda: store.rows(np.array([4]))):
        with pytest.raises(DamagedMatrix, match="1073741824"):
            read()
    np.testing.assert_array_equal(store.rows(np.array([3])).numpy(), np.ones((1, 3)))


def test_a_matrix_damaged_between_questions(tmp_path):
    adata = scgen.simulate_cells(n_cells=80, n_genes=40, n_batches=2, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, n_hidden=8)
    model.train(max_epochs=1, accelerator="cpu", progress=False)
    other = adata.copy()
    for cells in (adata, other):
        model.get_latent_representation(None if cells is adata else cells)
        cells.X.indices[0] = 2**30
        with pytest.raises(ValueError, match=r"adata\.X is a damaged sparse matrix"):
            model.get_latent_representation(None if cells is adata else cells)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"adata\.X is a damaged sparse matrix"):
        scgen.SCVI.load(tmp_path / "model", other)
    with pytest.raises(ValueError, match=r"adata\.X is a damaged sparse matrix"):
        model.query(other)
    with pytest.raises(ValueError, match=r"adata\.X is a damaged sparse matrix"):
        scgen.integrate(other, "batch")


def test_a_damaged_layer_is_not_looked_for_counts_in():
    adata = damaged("far out", "csc_matrix")
    adata.X = np.full((N, G), 0.5, np.float32)
    with pytest.raises(ValueError, match="not integers"):
        scgen.setup_anndata(adata)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_sound_structures_pass(dtype):
    dense = np.random.default_rng(0).poisson(0.3, (N, G))
    dense[[0, -1]] = 0
    for form in ("csr_matrix", "csc_matrix", "csr_array", "csc_array"):
        matrix = getattr(sparse, form)(dense)
        matrix.indices, matrix.indptr = matrix.indices.astype(dtype), matrix.indptr.astype(dtype)
        check_structure(matrix)
        assert isinstance(open_store(matrix), MemoryStore)
    check_structure(sparse.csr_matrix((0, 3)))
    check_structure(sparse.csc_matrix((3, 0)))
